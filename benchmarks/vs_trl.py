"""Compare a PPO step with TRL's PPOTrainer (1.12.0):   python benchmarks/vs_trl.py [--pairs 3] [--gradient_checkpoint]

Policy, reference, critic and reward model are random LLaMAs with 58M parameters. Each step has the same 8 prompts (32
to 448 tokens, log-uniform, seed 0) with 64 response tokens at temperature 1 and one optimizer step of policy and
critic, with the same threads and MALLOC_ settings; forward passes have 2048 tokens here and 8 samples in TRL. bf16:
ours with a float32 copy of the weights, TRL with its `bf16` (float32 weights, autocast) and frozen models in bf16.
fp32: float32 on both sides. Both processes alternate (benchmarks/alternate.py); the first round is a warm-up. --apart:
each pair is two processes, one after the other, with one warm-up step and one measured step each. TRL is used from this
Python if installed, otherwise from a virtual environment that the first call creates; it shares packages with ours
where the versions are the same.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.alternate import measure
from benchmarks.environment import MALLOC, add_dtype
from benchmarks.ppo_step import RESPONSE, SAMPLES, STAGES, build, prompt_batch, timed_step
from benchmarks.random_inputs import MODELS
from benchmarks.timing import peak
from ppo.config import PPOConfig
from utils.engine.engine import device, init_distributed, shutdown_distributed
from utils.moments import RunningMoments

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ["trl==1.12.0", "torch==2.13.0", "transformers==5.19.0", "accelerate==1.15.0", "datasets==5.2.0"]
WANTED_RATE, WANTED_MEMORY = 4.0, 0.6


def environment(folder: Path) -> Path:
    """Returns the Python with TRL: this one, or that of a virtual environment at `folder`, created if missing."""
    if importlib.util.find_spec("trl"):
        return Path(sys.executable)
    python, ready = folder / "bin" / "python", folder / ".ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
        own = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
        # With this file, pip regards our packages as installed and downloads only other versions; torch alone is 2 GB.
        (Path(own) / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *PACKAGES], check=True)
        ready.touch()
    return python


def ours(connection, options: argparse.Namespace) -> None:
    """Our side of `measure`; the last answer is (peak, {stage: median seconds})."""
    config = PPOConfig(
        policy_model_path="-", critic_model_path="-", data_path="-", num_rollouts=options.samples,
        batch_size=options.samples, maxlen_prompt=448 + options.response, maxlen_res=options.response,
        micro_batch_tokens=options.micro_batch_tokens, dtype=options.dtype,
        gradient_checkpoint=options.gradient_checkpoint, reuse_sampler_logprobs=options.reuse_sampler_logprobs,
    )  # fmt: skip
    connection.recv()
    init_distributed()
    models, prompts = build(config, MODELS[options.model]), prompt_batch(options.samples)
    moments, steps, more = RunningMoments(), [], True
    while more:
        _, seconds = timed_step(models, prompts, moments, len(steps), config)
        steps.append(seconds)
        connection.send(sum(seconds.values()))
        more = connection.recv() == "step"
    connection.send((peak(), {stage: statistics.median(step[stage] for step in steps[1:]) for stage in STAGES}))
    shutdown_distributed()


def theirs(connection, options: argparse.Namespace) -> None:
    """TRL's side of `measure`: replaces this process by TRL's Python, which inherits the connection."""
    os.set_inheritable(connection.fileno(), True)
    script = str(REPOSITORY / "benchmarks" / "trl_side.py")
    settings = {
        "model": options.model, "samples": options.samples, "response": options.response,
        "updates": 2 if options.apart else options.pairs + 1, "checkpointing": options.gradient_checkpoint,
        "bf16": options.dtype == "bf16", "dtype": options.trl_dtype, "batch": options.trl_batch,
        "rollout_batch": options.trl_rollout_batch or options.trl_batch, "cpu": device().type == "cpu",
    }  # fmt: skip
    os.execv(options.python, [str(options.python), script, str(connection.fileno()), json.dumps(settings)])


def compare(options: argparse.Namespace) -> tuple[list[list[float]], list[float], dict[str, float]]:
    """Runs both sides; returns (samples per second per pair, [ours, TRL's]; peak GiB; our seconds per stage)."""
    options.python = environment(options.environment.absolute())
    os.environ |= MALLOC | {
        "OMP_NUM_THREADS": str(options.threads),
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    sides, steps = ([ours, theirs] * options.pairs, 2) if options.apart else ([ours, theirs], options.pairs + 1)
    results = measure(sides, (options,), [options.samples] * steps, options.apart)
    rates = [[rate for found, _ in results[side::2] for rate in found] for side in (0, 1)]
    peaks = [max(gib for _, (gib, _) in results[side::2]) for side in (0, 1)]
    return rates, peaks, results[-2][1][1]


def report(rates: list[list[float]], peaks: list[float], stages: dict[str, float]) -> None:
    """Prints rates, memory, their ratios, and our time per stage."""
    own_peak, other_peak = peaks
    ratios = [a / b for a, b in zip(*rates, strict=True)]
    rates = [statistics.median(rate) for rate in rates]
    every = " ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"{'':18}{'ours':>8}{'TRL':>8}{'ratio':>8}{'target':>8}")
    ratio = statistics.median(ratios)
    print(f"{'samples/s':18}{rates[0]:8.2f}{rates[1]:8.2f}{ratio:8.2f}{WANTED_RATE:8.1f}   pairs: {every}")
    print(f"{'peak GiB':18}{own_peak:8.2f}{other_peak:8.2f}{own_peak / other_peak:8.2f}{WANTED_MEMORY:8.1f}")
    total = sum(stages.values())
    print("our step: " + ", ".join(f"{name} {taken:.2f} s ({taken / total:.0%})" for name, taken in stages.items()))


def parser_of() -> argparse.ArgumentParser:
    """Returns the parser of the flags."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=3, help="measured steps per side")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads per side; only one side works at a time")
    parser.add_argument("--apart", action="store_true", help="run the sides one after the other, to save memory")
    parser.add_argument("--model", choices=list(MODELS), default="58M", help="sizes of the four models")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="prompts per step")
    parser.add_argument("--response", type=int, default=RESPONSE, help="tokens per response")
    parser.add_argument("--micro_batch_tokens", type=int, default=2048, help="tokens per forward pass of ours")
    add_dtype(parser)
    parser.add_argument("--gradient_checkpoint", action="store_true", help="on both sides (TRL's default, not ours)")
    parser.add_argument("--reuse_sampler_logprobs", action="store_true", help="ours too, as TRL does (not our default)")
    dtypes = ["float32", "bfloat16"]
    parser.add_argument("--trl_dtype", choices=dtypes, default="float32", help="dtype of TRL's trained models")
    parser.add_argument("--trl_batch", type=int, choices=[1, 2, 4, 8], default=8, help="samples per forward of TRL")
    parser.add_argument("--trl_rollout_batch", type=int, help="the same in generation and scoring; default: the same")
    parser.add_argument("--environment", type=Path, default=REPOSITORY / "outputs" / "trl_env")
    return parser


def main() -> None:
    """Runs both sides and prints the comparison."""
    report(*compare(parser_of().parse_args()))


if __name__ == "__main__":
    main()
