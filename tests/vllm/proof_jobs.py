"""What tests of the proof do in processes of their own: models of many kinds, and faults that are injected."""

import torch

from ppo.decoding.sampling import Sampling
from ppo.decoding.vllm_engine import DISCARDED
from ppo.rollout import PolicySampler
from ppo.sampler_gap import gap_metrics
from ppo.vllm_sampler import VLLMSampler
from tests.vllm import models
from utils.engine.engine import init_distributed

GREEDY = Sampling(topp=1e-6)
SAMPLED = Sampling()


def follow(folder: str, stage: int, dtype: str = "fp32", steps: int = 10, lr: float = 1e-3) -> dict:
    """Samples before and after optimizer steps; compares with the policy's own decoder and forward."""
    init_distributed()
    sampler = models.start(models.flags(folder, zero_stage=stage, dtype=dtype))
    sampler.offloaded = (sampler.policy,)  # as where GPUs have too little memory
    before = compared(sampler)
    first = {name: x.clone() for name, x in sampler.weights()}
    for number in range(steps):
        models.train(sampler.policy, lr, number)
    moved = [float((x - first[name]).abs().max()) for name, x in sampler.weights()]
    kind = type(sampler.engine.model).__name__
    return {
        "class": kind, "discards": kind in DISCARDED, "moved": min(moved), "version": sampler.policy.version,
        "before": before, "after": compared(sampler), "elsewhere": sorted(elsewhere(sampler.engine.model)),
    }  # fmt: skip


@torch.no_grad()
def compared(sampler: VLLMSampler) -> dict:
    """Whether tokens are those of the own decoder, and how far log-probabilities are from the policy's."""
    prompts, own = models.prompts(), PolicySampler(sampler.policy, sampler.tokenizer, sampler.config)
    result = {}
    for name, sampling in (("greedy", GREEDY), ("sampled", SAMPLED)):
        rollout, other = sampler(prompts, sampling, 3), own(prompts, sampling, 3)
        logprobs, _ = sampler.policy(rollout.sequences, rollout.response_mask, 1.0)
        gap = gap_metrics(rollout.sampler_logprobs, logprobs, rollout.response_mask)
        same = rollout.sequences.shape == other.sequences.shape and torch.equal(rollout.sequences, other.sequences)
        result[name] = {
            "same": same, "gap": float(gap["sampler_gap_max"]), "kl": float(gap["sampler_kl"]),
            "tokens": int(rollout.response_mask.sum()),
        }  # fmt: skip
    return result


def elsewhere(model: torch.nn.Module) -> set[str]:
    """Names of attributes with tensors that are neither parameters nor buffers: sleep of level 2 would lose them."""
    found = set()
    for module in model.modules():
        for item in (module, getattr(module, "impl", None), getattr(module, "quant_method", None)):
            found |= {name for name, x in getattr(item, "__dict__", {}).items() if isinstance(x, torch.Tensor)}
    return found
