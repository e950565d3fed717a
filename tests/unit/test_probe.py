"""Checks of a model before a run: each way of running it gives the numbers of its own plain forward.

Models are real, tiny and randomised, of the families that transformers has.
"""

import copy

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import tests.helpers.varlen
import utils.models.padding_free
from ppo.decoding_check import choose_decoding
from ppo.models import PolicyModel
from sft.model import packing_failure
from tests.architectures.configs import tiny_config
from tests.architectures.folders import randomise
from tests.helpers.parts import ppo_config
from utils.errors import UserError
from utils.models.check import Probe, check_forward, distance
from utils.models.load import enable_checkpointing, training_mode, without_dropout
from utils.models.padding_free import decoder_of

FASTEST = {"llama": "llama_step", "qwen3": "llama_step", "gpt_oss": "transformers"} | dict.fromkeys(
    ("gpt2", "mixtral", "gemma3_text", "deepseek_v3"), "grouped"
)
WITHOUT_KEYS = ("mamba", "rwkv", "recurrent_gemma")  # states are lost from token to token
OTHER_CACHE = ("qwen3_next", "jamba", "lfm2", "falcon_h1")  # these crash
BEHIND_THE_HEAD = {
    "cohere": {"logit_scale": 0.5},
    "granite": {"logits_scaling": 3.0},
    "falcon_h1": {"lm_head_multiplier": 0.5},
    "gemma2": {"final_logit_softcapping": 2.0},
    "xlstm": {},
}


def lm_of(family: str, dtype: torch.dtype = torch.float32, **changes) -> PreTrainedModel:
    config = without_dropout(tiny_config(family))
    for name, value in changes.items():
        assert hasattr(config, name)
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        randomise(lm)
    return lm.to(dtype)


def decoding_of(lm: PreTrainedModel, said: list[str] | None = None) -> str:
    policy = PolicyModel(lm)
    choose_decoding(policy, ppo_config(), "--policies M", [].append if said is None else said.append)
    return policy.decoding


@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, torch.float32) for family in FASTEST), ("llama", torch.bfloat16)]
)
def test_right_models_pass_by_their_fastest_way(family, dtype):
    lm, said = lm_of(family, dtype), []
    check_forward(lm, "M", said.append)
    assert decoding_of(lm, said) == FASTEST[family]
    assert said == []


def test_falcon_decodes_with_its_own_attention():
    """It asks for the name of its attention's implementation, and takes ours for none."""
    said = []
    assert decoding_of(lm_of("falcon"), said) == "transformers"
    assert len(said) == 1 and said[0].startswith("--policies M: grouped decoding is not used: it fails with Falcon")


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, torch.float32) for family in (*WITHOUT_KEYS, *OTHER_CACHE)), ("mamba", torch.bfloat16)],
)
def test_models_with_another_state_than_keys_and_values_are_refused_for_decoding_alone(family, dtype):
    lm = lm_of(family, dtype)
    check_forward(lm, "M")
    with pytest.raises(UserError, match=rf"^--policies M: {type(lm).__name__} cannot be decoded .*give another model$"):
        decoding_of(lm)


def test_what_bf16_leaves_in_doubt_is_decided_in_float32_and_the_weights_stay():
    """RecurrentGemma without its state is off by less than the tolerance, but by more than rounding."""
    lm = lm_of("recurrent_gemma", torch.bfloat16)
    before = {name: x.clone() for name, x in lm.state_dict().items()}
    with pytest.raises(UserError, match=r"off by 0\.0\d+ standard deviations"):
        decoding_of(lm)
    assert all(x.dtype == before[name].dtype and torch.equal(x, before[name]) for name, x in lm.state_dict().items())


@pytest.mark.parametrize(("family", "changes"), BEHIND_THE_HEAD.items())
def test_scales_and_caps_behind_the_head_are_known(family, changes):
    lm = lm_of(family, **changes)
    probe = Probe(lm, "M")
    states = decoder_of(lm)(input_ids=probe.rows[0][None], use_cache=False).last_hidden_state
    bare = lm.get_output_embeddings()(states)[0].detach()
    assert float((bare - probe.true[0]).abs().max()) > 1e-3
    check_forward(lm, "M")


def test_decoders_that_get_decoder_does_not_give():
    for family in ("llama4_text", "modernbert-decoder", "gemma3"):
        assert decoder_of(lm_of(family))(input_ids=torch.tensor([[3, 4]])).last_hidden_state.shape[:2] == (1, 2)
    check_forward(lm_of("llama4_text"), "M")
    assert decoding_of(lm_of("llama4_text")) == "grouped"


def broken_llama() -> PreTrainedModel:
    lm = lm_of("llama")
    lm.model.forward = lambda **_: {}["pixel_values"]
    return lm


@pytest.mark.parametrize(
    ("build", "problem"),
    [
        (lambda: lm_of("hyperclovax", logits_scaling=0.5), "HyperCLOVAXForCausalLM changes its logits after the head"),
        (lambda: lm_of("bert"), "BertLMHeadModel changes its logits after the head"),
        (lambda: lm_of("xlm"), "XLMWithLMHeadModel attends to later tokens"),
        (broken_llama, "LlamaForCausalLM does not run on text .*KeyError: .pixel_values"),
    ],
)
def test_models_that_cannot_be_used_are_refused(build, problem):
    with pytest.raises(UserError, match=f"^M: {problem}"):
        check_forward(build(), "M")


def test_a_backbone_that_is_not_causal_is_refused():
    with pytest.raises(UserError, match=r"^M: XLMModel attends to later tokens"):
        check_forward(AutoModel.from_config(tiny_config("xlm")).eval(), "M", with_head=False)


def test_rows_that_may_not_be_joined_are_padded(monkeypatch):
    """Granite's layers are LLaMA's but for a factor that joined rows know nothing of."""
    lm, said = lm_of("granite", residual_multiplier=0.5), []
    check_forward(copy.deepcopy(lm), "M", said.append)
    assert said == []
    monkeypatch.setattr(utils.models.padding_free, "FULL_ATTENTION", ("granite",))
    assert PolicyModel(lm).joins_rows
    check_forward(lm, "M", said.append)
    assert len(said) == 1 and said[0].startswith("M: rows of GraniteForCausalLM are padded")
    assert not PolicyModel(lm).joins_rows and not PolicyModel(copy.deepcopy(lm)).joins_rows
    said.clear()
    assert decoding_of(lm, said) == "grouped"  # not by our own step, whose layers differ
    assert len(said) == 1 and "llama_step decoding is not used" in said[0]


def test_rows_are_padded_where_the_kernel_for_joined_ones_does_not_run(monkeypatch):
    def attend(*_):
        raise RuntimeError("no kernel image")

    tests.helpers.varlen.on_cpu(monkeypatch)
    lm, said = lm_of("llama"), []
    check_forward(lm, "M", said.append)
    assert said == [] and PolicyModel(lm).joins_rows
    monkeypatch.setattr(utils.models.padding_free, "attend", attend)
    check_forward(lm, "M", said.append)
    assert len(said) == 1 and "are padded" in said[0] and "no kernel image" in said[0]
    assert not PolicyModel(lm).joins_rows


@pytest.mark.parametrize("family", ["falcon", "mamba", "rwkv", "jamba", "gpt_oss", "llama4_text"])
def test_packed_dialogues_that_would_see_each_other(family):
    assert "standard deviations" in packing_failure(lm_of(family, torch.bfloat16), "M")


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3_text", "deepseek_v3"])
def test_packed_dialogues_that_do_not(family):
    assert packing_failure(lm_of(family, torch.bfloat16), "M") is None


def test_a_router_that_draws_its_experts_in_training_does_not_in_the_update():
    lm = lm_of("phimoe", router_jitter_noise=0.5)  # draws among nearly all
    ids = Probe(lm, "M").rows[0][None]
    true = lm(input_ids=ids).logits
    enable_checkpointing(lm)
    lm.train()
    assert distance(list(lm(input_ids=ids).logits), list(true)) > 1e-3
    training_mode(lm)
    assert torch.equal(lm(input_ids=ids).logits, true)
    assert all(layer.training for layer in lm.model.layers)


def test_the_model_and_the_random_state_are_as_before():
    policy = PolicyModel(lm_of("gpt2"))
    lm = policy.lm
    before, state = copy.deepcopy(lm.state_dict()), torch.get_rng_state()
    check_forward(lm, "M")
    choose_decoding(policy, ppo_config(), "M", print)
    packing_failure(lm, "M")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, before[name]) for name, x in lm.state_dict().items())
    assert not any(module.training or module._forward_hooks for module in policy.modules())
