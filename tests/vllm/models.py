"""Tiny models that vLLM runs on a CPU, where heads have 32, 64, 96 or more dimensions, and what is done with them."""

from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig

from ppo.config import PPOConfig
from ppo.models import PolicyModel
from ppo.types import PromptBatch
from ppo.vllm_sampler import VLLMSampler, start_vllm
from tests.architectures.folders import save_folder
from tests.helpers.parts import ppo_config, prompts_of
from utils.device import device
from utils.distributed import rank, world_size
from utils.engine.engine import DTYPES, TrainEngine
from utils.models.load import load_causal_lm
from utils.tokenizer import load_tokenizer

ROPE = {"rope_type": "default", "rope_theta": 1e4}
LLAMA_3 = ROPE | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = ROPE | {"rope_type": "linear", "factor": 2.0}
LENGTHS = (3, 10, 17, 24, 31, 150)  # of the prompts of a rank
SECOND = (len(LENGTHS) - 2, len(LENGTHS) - 1)  # prompts with a second response
WINDOW = 12  # tokens; the sequences of the tests are longer
GEMMA = {"sliding_window": WINDOW, "tie_word_embeddings": True}

# name -> (family, changes of its config)
MODELS: dict[str, tuple[str, dict]] = {
    "Llama": ("llama", {}),
    "Llama, tied": ("llama", {"tie_word_embeddings": True}),
    "Llama, four KV heads": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 4}),
    "Llama, heads of 64": ("llama", {"head_dim": 64}),
    "Llama, three heads": ("llama", {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3}),
    "Llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "Llama 3": ("llama", {"rope_parameters": LLAMA_3 | {"original_max_position_embeddings": 16}}),
    "Llama, linear rope": ("llama", {"rope_parameters": LINEAR}),
    "moss_zh": ("llama", {"vocab_size": 400}),  # as the tokenizer: the embedding grows by two tags
    "Qwen2": ("qwen2", {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}),
    "Qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "Qwen3": ("qwen3", {}),
    "Qwen3, tied": ("qwen3", {"tie_word_embeddings": True}),
    "Mistral": ("mistral", {"sliding_window": WINDOW}),
    "Phi-3": ("phi3", {"sliding_window": None}),
    "Gemma 2": ("gemma2", GEMMA | {"final_logit_softcapping": 12.0, "attn_logit_softcapping": 2.0}),
    "Gemma 3": ("gemma3_text", GEMMA),
    "Granite": ("granite", {"embedding_multiplier": 0.7, "residual_multiplier": 0.7, "logits_scaling": 0.7}),
}
REFUSED: dict[str, tuple[str, dict]] = {
    "GPT-2": ("gpt2", {}),
    "Mixtral": ("mixtral", {"num_local_experts": 4}),
    "Qwen3 MoE": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}),
}


def tiny_config(name: str) -> PretrainedConfig:
    """The config of a name in MODELS or REFUSED: two layers, two heads of 32 with one KV head, 401 tokens."""
    family, changes = (MODELS | REFUSED)[name]
    sizes = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256, "vocab_size": 401, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False, "initializer_range": 0.125,
    }  # fmt: skip
    return CONFIG_MAPPING[family](**sizes | changes)


def tiny_folder(folder: Path, name: str) -> Path:
    """Writes the model with random weights, all of which matter."""
    save_folder(tiny_config(name), folder)
    return folder


def flags(folder: str, **changes) -> PPOConfig:
    """Flags of a run with vLLM and the policy in `folder`."""
    sizes = {"maxlen_prompt": 200, "maxlen_res": 24, "rollout_batch_size": 3, "micro_batch_tokens": 256}
    return ppo_config(policy_model_path=folder, rollout_engine="vllm", **sizes | changes)


def start(config: PPOConfig, vllm_folder: str | None = None) -> VLLMSampler:
    """A policy in a training engine, whose states leave its device while vLLM is awake.

    vllm_folder: whose config vLLM reads instead of the policy's.
    """
    path, template = config.policy_model_path, "moss_zh" if "moss_zh" in config.policy_model_path else None
    tokenizer = load_tokenizer(path, template)
    engine = start_vllm(config, vllm_folder or path, "--policy_model_path", tokenizer, 0.01, len(prompts().ids))
    lm = load_causal_lm(path, DTYPES[config.dtype], device(), tokenizer=tokenizer, say=lambda _: None)
    policy = TrainEngine(PolicyModel(lm), config, "policy")
    return VLLMSampler(policy, tokenizer, config, engine, offloaded=(policy,))


def prompts() -> PromptBatch:
    """This rank's prompts: random tokens; the last two have two responses each.

    The longest fills a block of vLLM's prefix cache, 128 tokens on a CPU, so that its second response reads the cache.
    """
    draw = torch.Generator().manual_seed(rank())
    ids = [torch.randint(3, 390, (length,), generator=draw).tolist() for length in LENGTHS]
    first = prompts_of(*ids, first_place=len(LENGTHS) * rank())
    rows, members = [*range(len(ids)), *SECOND], [0] * len(ids) + [1] * len(SECOND)
    columns = {name: [getattr(first, name)[i] for i in rows] for name in ("ids", "turns", "places")}
    return PromptBatch(**columns, members=members)


def train(policy: TrainEngine, lr: float, number: int = 0) -> None:
    """One optimizer step on random sequences."""
    draw = torch.Generator().manual_seed(number * world_size() + rank())
    sequences = torch.randint(3, 390, (2, 24), generator=draw)
    policy.module.train()
    logprobs, _ = policy(sequences, torch.arange(24).expand(2, 24) > 8, 1.0)
    policy.backward(-logprobs.sum() / 32 / world_size())
    policy.measure()
    policy.apply(lr)
