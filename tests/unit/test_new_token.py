"""One new token a slot, straight through the layers: what the model's own forward says, and in which models."""

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, Qwen3Config

from ppo.decoding.attention import grouped
from ppo.decoding.kv_cache import SlotCache
from ppo.models import PolicyModel
from ppo.rollout import room_of
from tests.helpers.parts import ppo_config
from tests.helpers.tiny import LLAMA_KIND, SIZES, tiny_llama_config
from utils.models.padding_free import FULL_ATTENTION
from utils.tensors import position_ids

CONFIGS = LLAMA_KIND | {
    "llama, heads of their own": tiny_llama_config(num_key_value_heads=4),
    "llama, biases": tiny_llama_config(attention_bias=True, mlp_bias=True),
    "llama, stretched positions": tiny_llama_config(
        rope_parameters={"rope_type": "yarn", "factor": 3.0, "rope_theta": 10000.0}
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
def logits_of(lm, room: dict, dtype: torch.dtype) -> torch.Tensor:
    """[steps, slots, vocabulary] of three steps behind prompts of LENGTHS. room: straight, alone."""
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
            seen = torch.tensor(cache.lengths).view(1, 1, 1, -1) if room["alone"] else seen
            positions = torch.tensor(LENGTHS)[:, None] + step
            given = {"input_ids": ids[:, width + step, None], "attention_mask": seen, "position_ids": positions}
            steps.append(policy(decode=given | options | {"straight": room["straight"]}))
    return torch.stack(steps)


def test_every_architecture_in_the_list_is_tested():
    assert {config.model_type for config in CONFIGS.values()} == set(FULL_ATTENTION)


@pytest.mark.parametrize("alone", [False, True], ids=["a mask", "each slot alone"])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_models_own_forward(name, alone):
    lm, forwards = lm_of(CONFIGS[name]), []
    lm.get_decoder().register_forward_pre_hook(lambda *_: forwards.append(1))
    found = logits_of(lm, {"straight": True, "alone": alone}, torch.float32)
    assert len(forwards) == 1  # over the prompts
    own = logits_of(lm, {"straight": False, "alone": alone}, torch.float32)
    assert len(forwards) == 1 + 4
    torch.testing.assert_close(found, own, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_in_bf16_it_is_as_near_to_float32_as_the_models_own_forward(name):
    own_way = {"straight": False, "alone": False}
    exact = logits_of(lm_of(CONFIGS[name]).bfloat16(), own_way, torch.float32)
    own = logits_of(lm_of(CONFIGS[name]), own_way, torch.bfloat16)
    found = logits_of(lm_of(CONFIGS[name]), own_way | {"straight": True}, torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).norm() < 1.2 * (own.float() - exact).norm()


def test_where_it_is_used():
    """In what it knows, unless the weights stay split: then every rank calls the same modules."""
    config, place = ppo_config(), torch.device("cpu")
    llama = lm_of(CONFIGS["llama"]).get_decoder()
    assert room_of(config, llama, place).straight
    assert not room_of(config, llama, place, split=True).straight
    llama.config._attn_implementation = "flash_attention_2"  # for prompts and training; not a kernel is called here
    assert room_of(config, llama, place).straight
    assert not room_of(config, lm_of(CONFIGS["llama"], "eager").get_decoder(), place).straight
    windowed = lm_of(MistralConfig(**SIZES | {"sliding_window": 6}))
    assert not room_of(config, windowed.get_decoder(), place).straight
