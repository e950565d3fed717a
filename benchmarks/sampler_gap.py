"""Measure the gap between vLLM and the policy with equal weights:   python benchmarks/sampler_gap.py --model FOLDER

Prints k3 in nats per token, the largest difference of a log-probability, and the geometric mean ratio of the response
that is farthest from 1, for each buffer: vLLM against the scoring forward (what --sampler_kl_limit bounds), and each of
these against a float32 forward of the same weights, which shows how much the dtype explains. --tf32: also the scoring
forward against one whose attention multiplies in TF32, as vLLM's does for float32 on GPUs; it is imitated. Buffers:
--count responses of at most --lengths tokens at each of --temperatures, and as evaluations sample. Prompts: --data, or
random tokens.
"""

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from transformers import AttentionInterface

from benchmarks.environment import add_dtype
from benchmarks.random_inputs import random_ids
from data.choose_template import prepare_tokenizer
from data.encoded import form_options, load_encoded
from data.prompts import PromptEncoder
from ppo.config import PPOConfig
from ppo.decoding.sampling import EVALUATION, Sampling
from ppo.models import PolicyModel
from ppo.sampler_gap import gap_metrics
from ppo.types import PromptBatch, SampledRollout
from ppo.vllm_sampler import VLLMSampler, start_vllm
from utils.engine.engine import DTYPES, InferenceEngine, device, init_distributed
from utils.models.load import load_causal_lm
from utils.tensors import token_logprobs

NO_TOKENIZER = SimpleNamespace(eos_token_id=2, pad_token_id=0, get_vocab=dict)


def load(folder: str, dtype: torch.dtype) -> PolicyModel:
    """Returns the policy of a folder."""
    return PolicyModel(load_causal_lm(folder, dtype, device())).requires_grad_(False).eval()


@torch.no_grad()
def logprobs_of(policy: PolicyModel, rollout: SampledRollout, temperature: float) -> torch.Tensor:
    """Returns the log-probabilities of a rollout, float32 [batch, length], four rows at a time."""
    parts = [rollout.rows(slice(i, i + 4)) for i in range(0, len(rollout), 4)]
    return torch.cat([policy(x.sequences, x.response_mask, temperature)[0].float() for x in parts])


def cut(x: torch.Tensor) -> torch.Tensor:
    """Returns float32 numbers without the 13 lowest bits of their mantissas, as tensor cores read them for TF32."""
    return (x.contiguous().view(torch.int32) & -(1 << 13)).view(torch.float32)


def tf32_attention(module, query, key, value, attention_mask, scaling, **others) -> tuple[torch.Tensor, None]:
    """Causal attention for transformers, whose products are of `cut` numbers with exact sums. No left padding."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = cut(query) @ cut(key).transpose(2, 3) * scaling
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    weights = (scores.masked_fill(future, -torch.inf) - scores.amax(-1, keepdim=True)).exp()
    return (cut(weights) @ cut(value) / weights.sum(-1, keepdim=True)).transpose(1, 2).contiguous(), None


def line(sampler: torch.Tensor, policy: torch.Tensor, mask: torch.Tensor) -> str:
    """Returns the figures of one pair of log-probabilities."""
    gap = {name: float(x) for name, x in gap_metrics(sampler, policy, mask).items()}
    means = (policy - sampler).masked_fill(~mask, 0.0).sum(1) / mask.sum(1).clamp(min=1)
    ratio = math.exp(float(means.abs().max()))
    return f"k3 {gap['sampler_kl']:.2e}  largest {gap['sampler_gap_max']:.1e}  ratio {ratio:.4f}"


def main() -> None:
    """Prints three lines per buffer."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder of the policy")
    parser.add_argument("--data", help="prompts; default: random tokens, for a model without a tokenizer")
    add_dtype(parser)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 200])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0])
    parser.add_argument("--tf32", action="store_true", help="with --dtype fp32")
    parser.add_argument("--prompt_tokens", type=int, default=512, help="longest prompt; random ones have this length")
    options = parser.parse_args()
    init_distributed()
    AttentionInterface.register("tf32", tf32_attention)
    paths = {"policy_model_path": options.model, "critic_model_path": options.model, "data_path": options.data or "-"}
    lengths = {"maxlen_res": max(options.lengths), "maxlen_prompt": options.prompt_tokens + max(options.lengths)}
    config = PPOConfig(**paths, **lengths, dtype=options.dtype, rollout_batch_size=options.count)
    policy, exact = load(options.model, DTYPES[options.dtype]), load(options.model, torch.float32)
    exact.load_state_dict({name: x.float() for name, x in policy.state_dict().items()})
    if options.data:
        tokenizer, template = prepare_tokenizer(config, options.model, [("--model", options.model)], print)
        encoder = PromptEncoder(tokenizer, template, options.prompt_tokens, form_options(config))
        prompts, _ = load_encoded([options.data], encoder, config, 0, 0, print)
        ids = [prompt.ids for prompt in prompts.first(len(prompts))]
    else:
        tokenizer, rows = NO_TOKENIZER, policy.lm.config.vocab_size
        ids = random_ids([options.prompt_tokens] * 512, torch.Generator().manual_seed(0), rows)
    engine = start_vllm(config, options.model, "--model", tokenizer, 0.5, options.count)
    start, kinds = 0, [*map(Sampling, options.temperatures), EVALUATION]
    for length in options.lengths:
        sampler = VLLMSampler(InferenceEngine(policy), tokenizer, replace(config, maxlen_res=length), engine)
        for sampling in kinds:
            chosen = [ids[i % len(ids)] for i in range(start, start + options.count)]
            places = list(range(start, start + options.count))
            rollout = sampler(PromptBatch(chosen, [[] for _ in chosen], places), sampling, 0)
            scored, whole = (logprobs_of(x, rollout, sampling.temperature) for x in (policy, exact))
            mask, drawn = rollout.response_mask, rollout.sampler_logprobs
            print(f"{options.dtype}, {int(mask.sum())} tokens, at most {length}, {sampling}", flush=True)
            print(f"  vLLM, scoring    {line(drawn, scored, mask)}")
            print(f"  vLLM, float32    {line(drawn, whole, mask)}")
            print(f"  scoring, float32 {line(scored, whole, mask)}", flush=True)
            if options.tf32:
                exact.lm.set_attn_implementation("tf32")
                logits = (exact.lm(row[None]).logits / sampling.temperature for row in rollout.sequences)
                rows = (token_logprobs(x, row[None]) for x, row in zip(logits, rollout.sequences, strict=True))
                print(
                    f"  TF32, scoring    {line(torch.cat(list(rows)).masked_fill(~mask, 0.0), scored, mask)}",
                    flush=True,
                )
                exact.lm.set_attn_implementation("sdpa")
            start += options.count


if __name__ == "__main__":
    main()
