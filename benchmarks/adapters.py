"""Memory and seconds of PPO with adapters:   python benchmarks/adapters.py --demo FOLDER [--rank 16]

FOLDER is the one that `bash run_en.sh --demo` leaves in .demo/en. A reward model is trained for one step as an adapter
on the demo's model, so that policy, reference, critic and reward model can share their weights. Then train_ppo.py runs
with all weights, with adapters on models of their own, and with adapters on one base, --rounds times in turn. Memory is
that of the process that belongs to no file (RssAnon), at its highest, minus what it was before anything was loaded;
beside it is the prediction of --plan.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.environment import add_dtype
from experiments.settings import ENVIRONMENT

HERE = Path(__file__).parents[1]
KINDS = {
    "all weights": [],
    "adapters, own weights": ["--lora_rank", "{rank}", "--share_base", "never"],
    "adapters, one base": ["--lora_rank", "{rank}"],
}
STEPS = "--train_steps 3 --warmup_steps 0 --critic_pretrain_steps 1 --num_eval_prompts 0 --checkpoint_per_step 0"
STEPS += " --num_rollouts 16 --batch_size 8 --rollout_batch_size 16 --micro_batch_tokens 512 --maxlen_prompt 100"
STEPS += " --maxlen_res 48 --save_per_step 100"


def measure(argv: list[str]) -> None:
    """Prints, as JSON, bytes of memory that a run takes, bytes that its plan predicts, and the seconds of its steps."""
    import ppo.build  # noqa: F401 - what the run imports
    from benchmarks.checkpoint import PeakMemory
    from ppo.config import AMOUNTS, PRESETS, PPOConfig
    from ppo.planning.plan import plan
    from train_ppo import main
    from utils.flags.parser import parse_args

    config = parse_args(PPOConfig, argv, PRESETS, AMOUNTS)
    predicted = max(plan(config, 1).totals)
    with PeakMemory() as before:
        pass
    with PeakMemory() as peak:
        main(argv)
    rows = [json.loads(line) for line in (Path(config.model_save_path) / "metrics.jsonl").read_text().splitlines()]
    seconds = {part: [row[f"seconds_{part}"] for row in rows[2:]] for part in ("rollout", "score", "update")}
    print("MEASURED", json.dumps({"peak": (peak.mb - before.mb) * 2**20, "plan": predicted} | seconds))


def run(argv: list[str]) -> dict:
    """Returns what `measure` prints, of a new process."""
    command = [sys.executable, __file__, "--measure", *argv]
    done = subprocess.run(command, cwd=HERE, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("MEASURED")]
    if not found:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(found[0].removeprefix("MEASURED "))


def main() -> None:
    """Trains the reward model, then measures all kinds in turn."""
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True)
    parser.add_argument("--rank", default="16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--zero_stage", default="2")
    parser.add_argument("--gradient_checkpoint", default="False")
    add_dtype(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        base, reward = options.demo / "model", f"{place}/reward/final"
        flags = f"--hf_model_name_or_path {base} --data_path {options.demo}/preferences --train_steps 1 --batch_size 4"
        flags += (
            f" --lora_rank {options.rank} --export adapter --model_save_path {place}/reward --dtype {options.dtype}"
        )
        command = [sys.executable, "-m", "reward.train", *flags.split()]
        subprocess.run(command, cwd=HERE, env=os.environ | ENVIRONMENT, check=True, capture_output=True)
        found = {kind: [] for kind in KINDS}
        for number in range(options.rounds):
            for kind, more in KINDS.items():
                paths = f"--policy_model_path {base} --critic_model_path {reward} --data_path {options.demo}/prompts"
                paths += f" --dtype {options.dtype} --zero_stage {options.zero_stage} --overwrite --seed {number}"
                paths += f" --gradient_checkpoint {options.gradient_checkpoint} --model_save_path {place}/run"
                words = " ".join([paths, STEPS, *more]).format(rank=options.rank)
                found[kind].append(run(words.split()))
                print(kind, found[kind][-1], file=sys.stderr, flush=True)
    for kind, rows in found.items():
        peak, plan = statistics.median(row["peak"] for row in rows), rows[0]["plan"]
        parts = {
            name: statistics.median(x for row in rows for x in row[name]) for name in ("rollout", "score", "update")
        }
        print(
            f"{kind}: {peak / 1e9:.2f} GB measured, {plan / 1e9:.2f} GB planned ({plan / peak - 1:+.1%}); "
            + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in parts.items())
        )


if __name__ == "__main__":
    main()
