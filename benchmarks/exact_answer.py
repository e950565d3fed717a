"""Learn from the reference answers of prompts:   python benchmarks/exact_answer.py --world FOLDER

Additions of two numbers from 1 to 20. A small model is trained (sft.train) on answers of which half are wrong. Then
train_ppo.py trains it, per seed, with examples/rewards/gsm8k.py:exact, which reads the column `answer` of the prompts.
Prints the share of right answers in windows of steps, and that of held-out additions at the start and the end.

--world: folder made by `python -m experiments.world`; only its tokenizer and random model (base) are used.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).parents[1]))

from data.demo.files import write_jsonl
from experiments.intervals import over_seeds
from experiments.settings import ENVIRONMENT, REPOSITORY
from utils.errors import UserError
from utils.flags.parser import entry_point

LARGEST, NUM_VALID, NOISE = 20, 64, 0.5  # of the numbers; held-out additions; share of wrong answers in SFT
COPIES = 12  # of each addition in the dialogues, with an answer each
COMMON = {"dtype": "fp32", "zero_stage": 0, "micro_batch_tokens": 4096, "checkpoint_per_step": 0}
SFT = COMMON | {
    "seed": 1, "context_truncate": 48, "lr": 2e-3, "train_steps": 400, "warmup_steps": 20, "batch_size": 64,
    "save_per_step": 400,
}  # fmt: skip
PPO = COMMON | {
    "lr": 3e-4, "critic_lr": 1e-3, "lr_schedule": "constant", "critic_pretrain_steps": 5, "warmup_steps": 5,
    "num_rollouts": 128, "batch_size": 32, "rollout_batch_size": 128, "maxlen_prompt": 48, "maxlen_res": 16,
    "reward_clip": 2.0, "num_eval_prompts": NUM_VALID, "reward_fn": "examples/rewards/gsm8k.py:exact",
}  # fmt: skip


def build_data(folder: Path) -> None:
    """Writes prompts with reference answers, and dialogues with answers of which a share is wrong."""
    rng = random.Random(1)
    pairs = [(a, b) for a in range(1, LARGEST + 1) for b in range(1, LARGEST + 1)]
    rng.shuffle(pairs)
    for name in ("prompts", "dialogues"):
        (folder / name).mkdir()
    for name, part in (("valid", pairs[:NUM_VALID]), ("train", pairs[NUM_VALID:])):
        references = (
            {"prompt": f"what is {a} + {b}?", "answer": f"{a} + {b} = {a + b}\n#### {a + b}"} for a, b in part
        )
        write_jsonl(folder / "prompts" / f"{name}.jsonl", references)
        write_jsonl(folder / "dialogues" / f"{name}.jsonl", dialogues(part, rng))


def dialogues(pairs: list[tuple[int, int]], rng: random.Random) -> Iterator[dict]:
    """Yields COPIES of each addition with answers of their own, in random order."""
    for a, b in rng.sample(pairs * COPIES, len(pairs) * COPIES):
        said = a + b if rng.random() >= NOISE else max(0, a + b + rng.choice([-3, -2, -1, 1, 2, 3]))
        yield {"prompt": f"what is {a} + {b}?", "response": f"{a} + {b} = {said}"}


def run(*words: object, **flags: object) -> None:
    """Runs a command of this project to its end."""
    command = [
        sys.executable,
        *map(str, words),
        *(str(x) for name, value in flags.items() for x in (f"--{name}", value)),
    ]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed: {(done.stdout + done.stderr)[-2000:]}")


def learn(folder: Path, seed: int, steps: int, window: int) -> list[float]:
    """Trains with a seed; returns the share of right answers per window, and held out at the start and the end."""
    sft, out = folder / "sft" / "final", folder / f"ppo-{seed}"
    paths = {"policy_model_path": sft, "critic_model_path": sft, "data_path": folder / "prompts"}
    alone = PPO["critic_pretrain_steps"]  # after which the first evaluation is that of the policy before it trains
    total = steps + alone
    run("train_ppo.py", **PPO | paths, train_steps=steps, save_per_step=alone, seed=seed, model_save_path=out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    scores = [row["reward_exact"] for row in rows]
    windows = [fmean(scores[i : i + window]) for i in range(0, total - total % window, window)]
    held_out = [row["eval_reward_exact"] for row in rows if "eval_reward_exact" in row]
    print(
        f"seed {seed}: {' '.join(f'{x:.3f}' for x in windows)}, held out {held_out[0]:.3f} -> {held_out[-1]:.3f}",
        flush=True,
    )
    return [*windows, held_out[0], held_out[-1]]


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Trains the noisy policy, then PPO with each seed, and prints the windows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--world", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=95)
    parser.add_argument("--window", type=int, default=20, help="steps per window")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(options.workers) as pool:
        folder = Path(name)
        build_data(folder)
        base, data = options.world.resolve() / "base", folder / "dialogues"
        run("-m", "sft.train", **SFT, hf_model_name_or_path=base, data_path=data, model_save_path=folder / "sft")
        jobs = [pool.submit(learn, folder, seed, options.steps, options.window) for seed in range(1, options.seeds + 1)]
        found = [job.result() for job in jobs]
    for what, values in zip(
        [*range(1, len(found[0]) - 1), "held out, first", "held out, last"], zip(*found, strict=True), strict=True
    ):
        mean, half = over_seeds(list(values))
        print(f"{what if isinstance(what, str) else f'window {what}'}: {mean:.3f} ± {half:.3f}")


if __name__ == "__main__":
    main()
