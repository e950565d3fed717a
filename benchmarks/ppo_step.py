"""Measure the stages of a PPO step:   python benchmarks/ppo_step.py [--steps 3]

A 58M LLaMA (hidden size 512, 8 layers, 8 heads, feed-forward size 1376, vocabulary 32,000) with random weights, one
process, bf16 by default. 8 prompts of 32 to 448 tokens (log-uniform, seed 0) with 64 response tokens, one optimizer
step of policy and critic. Prints seconds per sample of rollout, score and update, peak memory, the machine's matrix-
product rate, and the share of it that scoring and update reach in useful FLOPs: no padding, heads only where needed, no
recomputation. All times are medians without the first step.
"""

import argparse
import copy
import math
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import nn

from benchmarks import timing
from benchmarks.environment import add_dtype
from benchmarks.random_inputs import SIZES, Sizes, random_lm, random_prompts
from data.batching.collate import micro_batches
from ppo.config import PPOConfig
from ppo.decoding.sampling import Sampling
from ppo.experience import make_experience
from ppo.models import Models, PolicyModel
from ppo.ranks import gather_batches
from ppo.rollout import PolicySampler
from ppo.score import score
from ppo.types import PromptBatch, Rollout
from ppo.update import update
from reward.model import ScalarHead, ScalarModel
from reward.scoring.ensemble import Ensemble, Frozen, Member
from utils.engine.engine import DTYPES, TrainEngine, device, init_distributed, shutdown_distributed
from utils.models.compile import compile_layers
from utils.models.load import enable_checkpointing
from utils.moments import RunningMoments

SAMPLES, RESPONSE = 8, 64
STAGES = ("rollout", "score", "update")
# A random model samples EOS with a probability of 1 / 32,000.
IDS = SimpleNamespace(eos_token_id=2, pad_token_id=0, chat_template=None)


def build(config: PPOConfig, sizes: Sizes = SIZES) -> Models:
    """Returns policy, critic, reference and reward model from the same random LLaMA."""
    dtype = DTYPES[config.dtype]
    lm = random_lm(sizes, dtype, device(), config.attn_implementation)
    if config.gradient_checkpoint:
        enable_checkpointing(lm)

    def scalar() -> ScalarModel:
        head = ScalarHead(lm.config.hidden_size, 1, bias=False, dtype=dtype, device=device())
        return ScalarModel(copy.deepcopy(lm.model), head)  # with gradient checkpointing if the policy has it

    reference, reward = (Frozen(m.requires_grad_(False), False) for m in (PolicyModel(copy.deepcopy(lm)), scalar()))
    critic, ensemble = TrainEngine(scalar(), config, "critic"), Ensemble([Member(reward, window=2048)])
    if config.compile:
        for model in (lm, critic.module, reference.model, reward.model):
            compile_layers(model)
    return Models(TrainEngine(PolicyModel(lm), config, "policy"), critic, reference, ensemble)


def prompt_batch(samples: int = SAMPLES) -> PromptBatch:
    """Returns random prompts as one buffer."""
    return PromptBatch(random_prompts(samples), [[]] * samples, list(range(samples)))


def forward_flops(model: nn.Module, rollout: Rollout, with_head: bool) -> float:
    """Returns the useful FLOPs of one forward pass: 2 per decoder weight and token, 2 per head weight and response
    token, and attention over earlier tokens.
    """
    backbone = model.lm.model if with_head else model.backbone
    weights = sum(p.numel() for p in backbone.layers.parameters())
    lengths = rollout.attention_mask.sum(1).tolist()
    config = backbone.config
    attention = sum(2 * length**2 * config.hidden_size * config.num_hidden_layers for length in lengths)
    head = 2 * config.hidden_size * config.vocab_size * int(rollout.response_mask.sum()) if with_head else 0
    return 2 * weights * sum(lengths) + attention + head


def settings(options: argparse.Namespace) -> PPOConfig:
    """Returns the configuration of the measured step."""
    return PPOConfig(
        policy_model_path="-", critic_model_path="-", data_path="-", num_rollouts=SAMPLES, batch_size=SAMPLES,
        maxlen_prompt=512, maxlen_res=RESPONSE, micro_batch_tokens=options.micro_batch_tokens,
        compile=options.compile, dtype=options.dtype, attn_implementation=options.attn_implementation,
    )  # fmt: skip


def matrix_rate(dtype: str) -> float:
    """Prints and returns the FLOP/s of a product of two large matrices."""
    rate = timing.matrix_rate(device(), DTYPES[dtype])
    print(f"{dtype} matrix rate {rate / 1e9:.0f} GFLOP/s, {torch.get_num_threads()} threads, {device()}")
    return rate


def timed_step(
    models: Models, prompts: PromptBatch, moments: RunningMoments, step: int, config: PPOConfig
) -> tuple[Rollout, dict[str, float]]:
    """Runs one PPO step on this rank's prompts; returns (rollout of all ranks, seconds per stage)."""

    def learn() -> Rollout:
        whole, whole_scores = gather_batches(prompts, rollout, scores)
        experience = make_experience(whole, whole_scores, moments, config)
        update(models.policy, models.critic, experience, config, step, config.lr, config.critic_lr)
        return whole

    sampler = PolicySampler(models.policy, IDS, config, config.reuse_sampler_logprobs)
    rollout, sampling = timing.timed(sampler, prompts, Sampling(), step)
    scores, scoring = timing.timed(score, rollout, prompts, models, None, IDS, 1.0, config)
    rollout, learning = timing.timed(learn)
    return rollout, dict(zip(STAGES, (sampling, scoring, learning), strict=True))


def parse_options(description: str) -> argparse.Namespace:
    """Returns the flags of a benchmark. description: its docstring."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--micro_batch_tokens", type=int, default=2048)
    add_dtype(parser)
    parser.add_argument("--compile", action="store_true", help="compile the decoder layers, in the first step")
    parser.add_argument("--attn_implementation", help="sdpa or eager; default: transformers' choice")
    return parser.parse_args()


def main() -> None:
    """Runs the steps and prints the table."""
    options = parse_options(__doc__)
    config = settings(options)
    init_distributed()
    models, prompts, moments = build(config), prompt_batch(), RunningMoments()
    seconds = {stage: [] for stage in STAGES}
    for step in range(options.steps + 1):
        rollout, taken = timed_step(models, prompts, moments, step, config)
        if not step:
            print(f"first step, not counted: {sum(taken.values()):.1f} s", flush=True)
        else:
            for stage, times in seconds.items():
                times.append(taken[stage])
    medians = {stage: statistics.median(times) for stage, times in seconds.items()}
    report(models, rollout, medians, config)
    shutdown_distributed()


def report(models: Models, rollout: Rollout, seconds: dict[str, float], config: PPOConfig) -> None:
    """Prints seconds per sample, shares of the matrix rate, and peak memory."""
    policy = forward_flops(models.policy.module, rollout, with_head=True)
    critic = forward_flops(models.critic.module, rollout, with_head=False)
    useful = {"rollout": math.nan, "score": 2 * policy + 2 * critic, "update": 3 * policy + 3 * critic}
    rate = matrix_rate(config.dtype)
    lengths = rollout.attention_mask.sum(1).tolist()
    padded = sum(
        len(rows) * max(lengths[i] for i in rows) for rows in micro_batches(lengths, config.micro_batch_tokens)
    )
    padding = 0.0 if models.policy.module.joins_rows else 1 - sum(lengths) / padded
    print(f"{sum(lengths)} real tokens in {SAMPLES} samples of {RESPONSE} response tokens")
    print(f"{padding:.1%} of the tokens in scoring and update are padding")
    for stage, time_taken in seconds.items():
        flops = useful[stage]
        share = f"  {flops / 1e9:6.0f} useful GFLOP, {flops / time_taken / rate:4.0%} of the matrix rate"
        print(f"{stage:8} {time_taken / SAMPLES:6.3f} s per sample{'' if math.isnan(flops) else share}")
    print(f"{'total':8} {sum(seconds.values()) / SAMPLES:6.3f} s per sample")
    print(f"peak memory {timing.peak():.2f} GiB {'on the GPU' if device().type == 'cuda' else 'resident'}")


if __name__ == "__main__":
    main()
