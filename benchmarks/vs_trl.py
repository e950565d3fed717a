"""A step of PPO against TRL's PPOTrainer (1.12.0):   python benchmarks/vs_trl.py [--pairs 3] [--gradient_checkpoint]

Random LLaMAs of 58M parameters as policy, reference, critic and reward model, the same 8 prompts a step (32 to 448
tokens, log-uniform, seed 0), 64 response tokens each at temperature 1, one optimizer step of policy and critic, the
same threads and MALLOC_ settings; forwards of 2048 tokens here, of 8 samples there. bf16: ours with a float32 copy of
the weights, TRL as its `bf16` does it (float32 weights, autocast), its frozen models in bf16. fp32: no other dtype on
either side.
Both are long-lived processes that step in turn (benchmarks/alternate.py); the first round warms up and is not counted.
--apart: a pair is two processes, one after the other, each with a step that warms up and one that counts.
TRL is used from this Python where it has it. Else it lives in an environment of its own, made on the first call; the
packages that both need are shared with ours where their versions are the same.
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
    """TRL's Python: this one where it has TRL, else a virtual environment at `folder`, made unless it is there."""
    if importlib.util.find_spec("trl"):
        return Path(sys.executable)
    python, ready = folder / "bin" / "python", folder / ".ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
        own = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
        # pip takes our packages for installed, and fetches those of other versions: torch alone is 2 GB.
        (Path(own) / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *PACKAGES], check=True)
        ready.touch()
    return python


def ours(connection, options: argparse.Namespace) -> None:
    """Our steps. See `measure` for the messages; the last one is (peak, {stage: median seconds})."""
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
    """TRL's steps: this process becomes one of TRL's environment, with the connection as it is."""
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
    """Runs both sides: (samples a second of each pair, [ours, TRL's]; GiB of each; our seconds by stage)."""
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
    """Rates, memory and their ratios; where our time goes."""
    own_peak, other_peak = peaks
    ratios = [a / b for a, b in zip(*rates, strict=True)]
    rates = [statistics.median(rate) for rate in rates]
    every = " ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"{'':18}{'ours':>8}{'TRL':>8}{'ratio':>8}{'wanted':>8}")
    print(
        f"{'samples a second':18}{rates[0]:8.2f}{rates[1]:8.2f}{statistics.median(ratios):8.2f}{WANTED_RATE:8.1f}",
        end="",
    )
    print(f"   pairs: {every}")
    print(f"{'peak GiB':18}{own_peak:8.2f}{other_peak:8.2f}{own_peak / other_peak:8.2f}{WANTED_MEMORY:8.1f}")
    total = sum(stages.values())
    print("our step: " + ", ".join(f"{name} {taken:.2f} s ({taken / total:.0%})" for name, taken in stages.items()))


def parser_of() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=3, help="counted steps of each side")
    parser.add_argument(
        "--threads", type=int, default=2, help="CPU threads of each side; one works while the other waits"
    )
    parser.add_argument(
        "--apart", action="store_true", help="run one side after the other: for devices without memory for both"
    )
    parser.add_argument("--model", choices=list(MODELS), default="58M", help="sizes of the four models")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="prompts per step")
    parser.add_argument("--response", type=int, default=RESPONSE, help="tokens of each response")
    parser.add_argument("--micro_batch_tokens", type=int, default=2048, help="tokens of our forwards")
    add_dtype(parser)
    parser.add_argument("--gradient_checkpoint", action="store_true", help="on both sides (TRL's default, not ours)")
    parser.add_argument("--reuse_sampler_logprobs", action="store_true", help="ours too, as TRL does (not our default)")
    parser.add_argument(
        "--trl_dtype", choices=["float32", "bfloat16"], default="float32", help="dtype of the models that TRL trains"
    )
    parser.add_argument("--trl_batch", type=int, choices=[1, 2, 4, 8], default=8, help="samples of a forward of TRL")
    parser.add_argument("--trl_rollout_batch", type=int, help="the same while it generates and scores")
    parser.add_argument("--environment", type=Path, default=REPOSITORY / "outputs" / "trl_env")
    return parser


def main() -> None:
    """Runs both sides, prints the comparison."""
    report(*compare(parser_of().parse_args()))


if __name__ == "__main__":
    main()
