"""A PPO step of four models of 1.1B against TRL's PPOTrainer: samples per second and peak memory, two pairs of steps.

32 prompts of 32 to 448 tokens, 128 response tokens, one optimizer step, checkpointing (TRL's default) on both sides.
Weights, gradients and Adam's moments of both trained models take 35 GB here and 35 GB there, frozen models 4 GB, before
any activations: both sides do not fit 80 GB together, so each of the four processes ends before the next one begins.
"""

import importlib.util

from benchmarks.vs_trl import WANTED_MEMORY, WANTED_RATE, compare, parser_of

PAIRS = 2
FLAGS = {
    "model": "1.1B", "samples": 32, "response": 128, "micro_batch_tokens": 8192, "threads": 8,
    "trl_batch": 8, "trl_rollout_batch": 32,
}  # fmt: skip
TOY = {"model": "tiny", "samples": 8, "response": 8, "threads": 1}


def check(toy: bool, report) -> None:
    """Figures: samples per second and GiB of both sides, their ratios, our seconds by stage."""
    report(aim_ratio=WANTED_RATE, aim_memory_ratio=WANTED_MEMORY)
    if not importlib.util.find_spec("trl"):
        report(left_out="this Python has no trl; give --wheels")
        report.expect(toy, "this Python has no trl; give --wheels")
        return
    flags = [f"--{name}={value}" for name, value in (TOY if toy else FLAGS).items()]
    options = parser_of().parse_args([*flags, "--apart", "--gradient_checkpoint", f"--pairs={1 if toy else PAIRS}"])
    (own, other), (own_gib, other_gib), stages = compare(options)
    report(
        samples_per_s=own, trl_samples_per_s=other, ratios=[a / b for a, b in zip(own, other, strict=True)],
        ratio=sum(own) / sum(other), gib=own_gib, trl_gib=other_gib, memory_ratio=own_gib / other_gib,
        **{f"{stage}_s": seconds for stage, seconds in stages.items()},
    )  # fmt: skip
