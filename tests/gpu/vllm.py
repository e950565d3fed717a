"""vLLM against the policy's own engine at 7B: tokens per second, and seconds to copy, compare, wake and sleep."""

import importlib.util
import tempfile
from types import SimpleNamespace

import torch

from benchmarks.random_inputs import MODELS, config_of, random_ids, random_lm
from benchmarks.timing import GIB, timed
from ppo.config import PPOConfig
from ppo.decoding.sampling import Sampling
from ppo.models import PolicyModel
from ppo.rollout import PolicySampler
from ppo.sampler_gap import KL_LIMITS, gap_metrics
from ppo.types import PromptBatch, SampledRollout
from ppo.vllm_sampler import VLLMSampler
from utils.engine.engine import InferenceEngine, device, init_distributed

BATCHES, PROMPT, RESPONSE = (8, 64, 256), 128, 128  # sequences; tokens
SHARE = 0.62  # of an H100: 12.6 GiB of weights and 32 GiB of cache for 256 sequences
TINY = MODELS["tiny"] | {"num_attention_heads": 2, "num_key_value_heads": 1}  # heads of 32, the least on a CPU
TOKENS = SimpleNamespace(eos_token_id=2, pad_token_id=0)  # a random model nearly never ends a response


def check(toy: bool, report) -> None:
    """Figures: tokens per second of both engines per batch, prompts included; seconds of a copy and a comparison."""
    if importlib.util.find_spec("vllm") is None:
        report(skipped="vLLM is not installed: source utils/setup.sh vllm")
        return
    from ppo.decoding.vllm_engine import VLLMEngine

    sizes, dtype = (TINY, torch.float32) if toy else (MODELS["7B"], torch.bfloat16)
    batches, prompt, response = ((2, 4), 8, 8) if toy else (BATCHES, PROMPT, RESPONSE)
    init_distributed()
    with tempfile.TemporaryDirectory() as folder:
        config_of(sizes | {"architectures": ["LlamaForCausalLM"]}).save_pretrained(folder)
        options = {"memory_share": SHARE, "cache": 1 << 24 if toy else None}
        most = prompt + response
        engine, start = timed(VLLMEngine, folder, dtype, 32000, most, max(batches), 8192, **options)
    _, asleep = timed(engine.sleep)
    policy = PolicyModel(random_lm(sizes, dtype, device()).eval()).requires_grad_(False)
    report(start_s=start, sleep_s=asleep, asleep_gib=used_gib() - weights_gib(policy))
    ids = random_ids([prompt] * max(batches), torch.Generator().manual_seed(0))
    for i, batch in enumerate(batches):
        paths = dict.fromkeys(("policy_model_path", "critic_model_path", "data_path"), "-")
        lengths = {"maxlen_prompt": most, "maxlen_res": response, "rollout_batch_size": batch}
        config = PPOConfig(**paths, **lengths, micro_batch_tokens=8192)
        samplers = {"own": PolicySampler(InferenceEngine(policy), TOKENS, config)}
        samplers["vllm"] = VLLMSampler(InferenceEngine(policy), TOKENS, config, engine)
        if not i:
            synchronise(engine, samplers["vllm"], report)
        prompts = PromptBatch(ids[:batch], [[] for _ in range(batch)], list(range(batch)))
        for name, sampler in samplers.items():
            sampler(prompts, Sampling(), 0)  # kernels and graphs of this batch are made
            rollout, seconds = timed(sampler, prompts, Sampling(), 0)
            report(**{f"{batch}_{name}_tokens_per_s": int(rollout.response_mask.sum()) / seconds})
            torch.cuda.empty_cache()
        compare(policy, rollout, dtype, batch, report)


def synchronise(engine, sampler: VLLMSampler, report) -> None:
    """Copies the weights to vLLM and compares them, twice: the second time stands for all that follow."""
    for _ in range(2):
        _, wake = timed(engine.wake, "weights")
        _, copy = timed(engine.load, sampler.weights())
        difference, proof = timed(engine.first_difference, sampler.weights())
        _, cache = timed(engine.wake, "kv_cache")
        _, asleep = timed(engine.sleep)
        report(wake_s=wake + cache, sync_s=copy, proof_s=proof, sleep_s=asleep)
        report.expect(difference is None, f"{difference} differs after a copy of all weights")


@torch.no_grad()
def compare(policy: PolicyModel, rollout: SampledRollout, dtype: torch.dtype, batch: int, report) -> None:
    """Reports how far vLLM's log-probabilities are from the policy's, for at most eight responses."""
    rows = rollout.rows(slice(0, 8))
    own, _ = policy(rows.sequences, rows.response_mask, 1.0)
    gap = {name: float(x) for name, x in gap_metrics(rows.sampler_logprobs, own.float(), rows.response_mask).items()}
    report(**{f"{batch}_kl": gap["sampler_kl"], f"{batch}_gap_max": gap["sampler_gap_max"]})
    limit = KL_LIMITS["fp32" if dtype == torch.float32 else "bf16"]
    report.expect(gap["sampler_kl"] <= limit, f"{batch}: k3 is {gap['sampler_kl']:.2g} nats per token, above {limit}")


def used_gib() -> float:
    """On the GPU, by all processes; 0 on a CPU."""
    free, total = torch.cuda.mem_get_info() if torch.cuda.is_initialized() else (0, 0)
    return (total - free) / GIB


def weights_gib(policy: PolicyModel) -> float:
    """Of the weights; 0 on a CPU."""
    return sum(p.nbytes for p in policy.parameters()) / GIB if torch.cuda.is_initialized() else 0.0
