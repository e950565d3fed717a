"""One new token per slot, straight through the layers, gives the logits of the model's own forward."""

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, Qwen3Config
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ppo.decoding.attention import grouped
from ppo.decoding.kv_cache import SlotCache
from ppo.decoding.sampling import Sampling
from ppo.models import PolicyModel
from ppo.rollout import PolicySampler, decoding_options
from tests.helpers.parts import PROMPTS, ppo_config, prompts_of, tiny_policy, token_ids
from tests.helpers.tiny import LLAMA_KIND, SIZES, tiny_llama_config
from utils.engine.engine import InferenceEngine
from utils.tensors import position_ids

CONFIGS = LLAMA_KIND | {
    "llama, biases, stretched positions": tiny_llama_config(
        num_key_value_heads=4,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={"rope_type": "yarn", "factor": 3.0, "rope_theta": 10000.0},
    ),
    "qwen3, heads of another size": Qwen3Config(**SIZES | {"head_dim": 12}),
}
LENGTHS = [5, 9, 2]


def lm_of(config, attention: str = "sdpa"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
        for parameter in lm.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))  # biases and norms that do something
    return lm


@torch.no_grad()
def logits_of(lm, llama_step: bool, dtype: torch.dtype) -> torch.Tensor:
    """[steps, slots, vocabulary] of three steps behind prompts of LENGTHS."""
    policy, ids = PolicyModel(lm.to(dtype)), torch.randint(3, 400, (3, 12), generator=torch.Generator().manual_seed(1))
    width, cache, steps = max(LENGTHS), SlotCache(len(LENGTHS), 40, torch.device("cpu")), []
    mask = torch.arange(width) >= width - torch.tensor(LENGTHS)[:, None]
    cache.append(mask, list(LENGTHS), None)
    options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    with grouped(lm.config):
        prompts = {"input_ids": ids[:, :width], "attention_mask": mask, "position_ids": position_ids(mask)}
        policy(decode=prompts | options)
        for step in range(3):
            seen = cache.advance()
            positions = torch.tensor(LENGTHS)[:, None] + step
            given = {"input_ids": ids[:, width + step, None], "attention_mask": seen, "position_ids": positions}
            steps.append(policy(decode=given | options | {"llama_step": llama_step}))
    return torch.stack(steps)


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_models_own_forward(name):
    lm, forwards = lm_of(CONFIGS[name]), []
    lm.get_decoder().register_forward_pre_hook(lambda *_: forwards.append(1))
    found = logits_of(lm, True, torch.float32)
    assert len(forwards) == 1  # over the prompts
    own = logits_of(lm, False, torch.float32)
    assert len(forwards) == 1 + 4
    torch.testing.assert_close(found, own, atol=2e-5, rtol=2e-5)


def test_in_bf16_it_is_as_near_to_float32_as_the_models_own_forward():
    config = CONFIGS["qwen3"]
    exact = logits_of(lm_of(config).bfloat16(), False, torch.float32)
    own, found = (logits_of(lm_of(config), llama_step, torch.bfloat16) for llama_step in (False, True))
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).norm() < 1.2 * (own.float() - exact).norm()


def test_not_with_split_weights_where_every_rank_calls_the_same_modules():
    policy = PolicyModel(lm_of(CONFIGS["llama"]))
    assert decoding_options(ppo_config(), policy).llama_step
    assert not decoding_options(ppo_config(), policy, True).llama_step


def test_the_sampler_uses_it():
    """The model's own forward runs over prompts alone; after that transformers' attention is as it was."""
    policy, forwards = tiny_policy(), []
    policy.decoder.register_forward_pre_hook(lambda *_: forwards.append(1))
    PolicySampler(InferenceEngine(policy), token_ids(eos=-1), ppo_config())(prompts_of(*PROMPTS), Sampling(), 0)
    assert len(forwards) == 1 and policy.lm.config._attn_implementation == "sdpa"
    policy(torch.ones(1, 3, dtype=torch.int64), torch.tensor([[False, True, True]]))  # joined rows
    assert AttentionInterface()["sdpa"] is sdpa_attention_forward
