"""Loading and saving what LLaMA does not have: buffers, parts for images, caps of attention, LongRoPE."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ppo.models import PolicyModel
from reward.model import check_scalar_export, load_scalar_model, save_scalar_model
from tests.architectures.configs import LONG_ROPE, ROPE, tiny_config
from tests.architectures.folders import save_folder
from tests.helpers.parts import ppo_config
from utils.engine.engine import TrainEngine
from utils.errors import UserError
from utils.models.export import check_names, save_causal_lm, saved_tensors
from utils.models.load import check_window, enable_checkpointing, load_causal_lm, window_of, without_dropout
from utils.tokenizer import load_tokenizer

CPU, IDS = torch.device("cpu"), torch.tensor([[5, 9, 7, 3, 8, 4, 6, 11]])
WITH_BUFFERS = ("deepseek_v3", "gemma4_text", "apertus")


def folder_of(family: str, folder: Path, **changes) -> str:
    config = tiny_config(family)
    for name, value in changes.items():
        setattr(config.get_text_config(), name, value)
    with torch.random.fork_rng():
        save_folder(config, folder)
    return str(folder)


def load(path: str, said: list[str] | None = None, kernel: str | None = None):
    return load_causal_lm(path, torch.float32, CPU, kernel, say=[].append if said is None else said.append)


def tensors_in(folder: str) -> set[str]:
    return {name for file in Path(folder).glob("*.safetensors") for name in safe_open(file, "pt").keys()}  # noqa: SIM118


@torch.no_grad()
def logits_of(lm) -> torch.Tensor:
    return lm(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("family", [*WITH_BUFFERS, "mixtral", "gpt2", "gemma3"])
def test_a_saved_policy_is_the_loaded_one(single_process, family, tmp_path):
    """Its tensors have the source's names, buffers among them, as other tools gave them to the folder."""
    path = folder_of(family, tmp_path / "source")
    lm = load(path)
    check_names(AutoModelForCausalLM, lm.config, saved_tensors(lm), path)
    before = logits_of(lm)
    engine = TrainEngine(PolicyModel(lm), ppo_config(zero_stage=1), "policy")
    state = {name.removeprefix("lm."): x for name, x in engine.full_state_dict().items()}
    assert len(state) > len(list(lm.parameters())) or family not in WITH_BUFFERS
    out = str(tmp_path / "out")
    save_causal_lm(lm.config, state, out, load_tokenizer(path))
    assert tensors_in(out) == tensors_in(path)
    torch.testing.assert_close(logits_of(load(out)), before, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["deepseek_v3", "minimax", "gemma3"])
def test_a_saved_reward_model_is_the_trained_one(family, tmp_path):
    """For us and for transformers' own classifier, which asks for a pad id where it looks for the last token."""
    path, out = folder_of(family, tmp_path / "source", pad_token_id=None), str(tmp_path / "out")
    model = load_scalar_model(path, torch.float32, CPU, say=lambda _: None)
    check_scalar_export(model, path)
    save_scalar_model(model, out)
    mask = torch.ones_like(IDS).bool()
    with torch.no_grad():
        scalars = model(IDS, mask)
        again = load_scalar_model(out, torch.float32, CPU, trained=True, say=lambda _: None)
        torch.testing.assert_close(again(IDS, mask), scalars, rtol=0, atol=0)
        theirs = AutoModelForSequenceClassification.from_pretrained(out, dtype=torch.float32)
        two = torch.cat([IDS, IDS.flip(1)])
        torch.testing.assert_close(theirs(two).logits[0, 0], scalars[0, -1], rtol=1e-4, atol=1e-4)


def test_what_could_not_be_loaded_again_is_refused_before_a_run(tmp_path):
    lm = load(folder_of("deepseek_v3", tmp_path / "deepseek"))
    short = dict(lm.named_parameters())
    with pytest.raises(UserError, match=r"^M: a deepseek_v3 model cannot be saved as .*e_score_correction_bias"):
        check_names(AutoModelForCausalLM, lm.config, short, "M")
    ctrl = load_scalar_model(folder_of("ctrl", tmp_path / "ctrl"), torch.float32, CPU, say=lambda _: None)
    with pytest.raises(UserError, match=r"^M: a ctrl model cannot be saved as .*\(classifier.weight and 1 more\)"):
        check_scalar_export(ctrl, "M")


def test_caps_of_attention_are_not_lost_by_the_kernel(tmp_path):
    path, said = folder_of("gemma2", tmp_path / "source"), []
    assert [load(path, said, kernel).config._attn_implementation for kernel in (None, "sdpa")] == ["eager", "sdpa"]
    load(path, said, "eager")
    load(folder_of("gemma2", tmp_path / "without", attn_logit_softcapping=None), said)
    assert len(said) == 2
    assert "--attn_implementation eager is used" in said[0] and "--attn_implementation sdpa ignores its cap" in said[1]


def test_checkpointing_that_a_model_does_not_have():
    with pytest.raises(UserError, match=r"^--gradient_checkpoint: CTRLModel does not support it; leave it out$"):
        enable_checkpointing(AutoModelForCausalLM.from_config(tiny_config("ctrl")).transformer)
    enable_checkpointing(AutoModelForCausalLM.from_config(tiny_config("llama")))


def test_dropout_of_the_parts_is_off_too():
    config = tiny_config("gemma3")
    config.text_config.attention_dropout = config.vision_config.attention_dropout = 0.5
    config = without_dropout(config)
    assert config.text_config.attention_dropout == config.vision_config.attention_dropout == 0.0


def lm_with(family: str, **changes):
    config = tiny_config(family)
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        return AutoModelForCausalLM.from_config(type(config)(**config.to_dict())).eval()


def test_longrope_ends_where_the_rows_of_a_batch_would_change_each_other():
    original = {"sliding_window": None, "original_max_position_embeddings": 8}
    lm = lm_with("phi3", rope_parameters=LONG_ROPE, **original)
    short, long = torch.arange(3, 9), torch.arange(3, 13)
    beside = torch.stack([torch.cat([short, short.new_zeros(4)]), long])
    with torch.no_grad():
        alone, together = lm(short[None]).logits[0], lm(beside).logits[0, : len(short)]
    assert (alone - together).abs().max() > 1e-3
    assert window_of(lm) == 8
    check_window(lm, 8, "--maxlen_prompt")
    with pytest.raises(UserError, match=r"^--maxlen_prompt 9: one row of more than 8 tokens .*; use at most 8$"):
        check_window(lm, 9, "--maxlen_prompt")


def test_other_windows():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    for rope in ({"rope_type": "default"}, {"rope_type": "dynamic", "factor": 2.0}, yarn):
        assert window_of(lm_with("llama", rope_parameters=ROPE | rope)) == 512  # rows do not change each other
    with pytest.raises(UserError, match=r"^--context_truncate 513 is longer than the model's window; use at most 512"):
        check_window(lm_with("llama"), 513, "--context_truncate")
    layers = lm_with("gemma3_text")
    layers.config.rope_parameters["full_attention"] = LONG_ROPE | {"original_max_position_embeddings": 64}
    assert window_of(layers) == 64
