"""Seconds per step and peak memory of estimators:   python benchmarks/estimators.py --world FOLDER

Runs train_ppo.py once per estimator and round, in turn, so that other load affects all equally. Two sizes: the model of
the experiments' world (python -m experiments.world), with experiments/settings; and a random LLaMA of --hidden and
--layers, scored by a function, with a critic of its size. Seconds are medians over steps; memory is the peak of the
process.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parents[1]
sys.path.insert(0, str(HERE))
ESTIMATORS = ("gae", "rloo", "grpo", "reinforce_pp")
MEASURED = "import resource, runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); "
MEASURED += "print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"


def run(argv: list[str], out: Path) -> tuple[float, float]:
    """Returns (median seconds of a step that trains the policy, peak GB) of one run."""
    from experiments.settings import ENVIRONMENT

    command = [sys.executable, "-c", MEASURED, "train_ppo.py", *argv, "--model_save_path", str(out), "--overwrite"]
    done = subprocess.run(command, cwd=HERE, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    rows = [row for row in rows if "policy_loss" in row][1:]
    seconds = [sum(row[f"seconds_{part}"] for part in ("rollout", "score", "update")) for row in rows]
    peak = next(line for line in done.stdout.splitlines() if line.startswith("PEAK"))
    return statistics.median(seconds), int(peak.split()[1]) * 1024 / 1e9


def of_world(world: Path, estimator: str, steps: int) -> list[str]:
    """Returns the flags of an estimator's setting in the experiments, but for the number of steps."""
    from experiments.settings import load_flags

    flags = load_flags(estimator) | {"train_steps": steps, "warmup_steps": 1, "seed": 101, "checkpoint_per_step": 0}
    flags = {name: world / value if name.endswith("_path") else value for name, value in flags.items()}
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def of_model(folder: Path, estimator: str, steps: int) -> list[str]:
    """Returns flags for the random model in `folder`: 16 responses of up to 64 tokens per step."""
    group = "1" if estimator in ("gae", "reinforce_pp") else "4"
    words = f"--policy_model_path {folder} --data_path {folder}/prompts.jsonl --reward_fn {folder}/reward.py:length"
    words += f" --advantage_estimator {estimator} --num_responses_per_prompt {group} --train_steps {steps}"
    words += " --dtype fp32 --num_rollouts 16 --batch_size 16 --maxlen_prompt 128 --maxlen_res 64 --warmup_steps 0"
    words += " --num_eval_prompts 0 --checkpoint_per_step 0 --micro_batch_tokens 1024 --zero_stage 0"
    critic = f" --critic_pretrain_steps 1 --critic_model_path {folder}" if estimator == "gae" else ""
    return (words + critic).split()


def make_model(folder: Path, tokenizer: Path, hidden: int, layers: int) -> str:
    """Writes a random LLaMA, prompts and a reward function; returns the number of parameters as text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers}
    config = LlamaConfig(vocab_size=2048, max_position_embeddings=256, num_attention_heads=8, **sizes)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    shutil.copy(tokenizer, folder / "tokenizer.model")
    (folder / "reward.py").write_text("def length(prompts, answers):\n    return [len(set(a)) for a in answers]\n")
    lines = (json.dumps({"prompt": f"tell me about number {i}"}) for i in range(256))
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return f"{model.num_parameters() / 1e6:.0f}M parameters"


def main() -> None:
    """Prints a table per size."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--world", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        size = make_model(folder, options.world / "base" / "tokenizer.model", options.hidden, options.layers)
        works = {
            "the experiments' world": lambda estimator: of_world(options.world, estimator, 60),
            size: lambda estimator: of_model(folder, estimator, 3),
        }
        for title, flags in works.items():
            found = {estimator: [] for estimator in ESTIMATORS}
            for _ in range(options.rounds):
                for estimator in ESTIMATORS:
                    found[estimator].append(run(flags(estimator), Path(name) / "run"))
            print(f"\n{title}\n| estimator | seconds per step | GAE / this | peak GB |\n|---|---|---|---|")
            first = [seconds for seconds, _ in found["gae"]]
            for estimator, pairs in found.items():
                seconds, peak = ([pair[i] for pair in pairs] for i in (0, 1))
                ratios = sorted(a / b for a, b in zip(first, seconds, strict=True))
                spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} - {ratios[-1]:.2f})"
                print(f"| {estimator} | {statistics.median(seconds):.3f} | {spread} | {max(peak):.2f} |", flush=True)


if __name__ == "__main__":
    main()
