"""Memory and seconds of PPO with adapters:   python benchmarks/adapters.py --demo FOLDER [--rank 16]

FOLDER is the one that `bash run_en.sh --demo` leaves in .demo/en. A reward model is trained for one step as an adapter
on the demo's model, so that policy, reference, critic and reward model can share their weights. Then train_ppo.py runs
with all weights, with adapters on models of their own, and with adapters on one base: once for the memory, and
--rounds times in turn for the seconds. Memory is that of the process that belongs to no file (RssAnon), at its highest,
minus what it was before anything was loaded, with an allocator that returns what is freed. Beside it is the prediction
of --plan, without the logits that only a GPU holds in float32. Responses are of full length, as the plan assumes.
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

from benchmarks.environment import MALLOC, add_dtype
from experiments.settings import ENVIRONMENT

HERE = Path(__file__).parents[1]
KINDS = {
    "all weights": [],
    "adapters, own weights": ["--lora_rank {rank} --export adapter --share_base never"],
    "adapters, one base": ["--lora_rank {rank} --export adapter"],
}
PARTS = ("rollout", "score", "update")
STEPS = "--train_steps 3 --warmup_steps 0 --critic_pretrain_steps 1 --num_eval_prompts 0 --checkpoint_per_step 0"
STEPS += " --num_rollouts 16 --batch_size 8 --rollout_batch_size 16 --micro_batch_tokens 512 --maxlen_prompt 100"
STEPS += " --maxlen_res 48 --save_per_step 100 --stop_token <file_sep>"  # which it never says
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000", "MALLOC_ARENA_MAX": "1"}


def measure(argv: list[str]) -> None:
    """Prints, as JSON, bytes of memory that a run takes, bytes that its plan predicts, and the seconds of its steps."""
    import ppo.build  # noqa: F401 - what the run imports
    from benchmarks.checkpoint import PeakMemory
    from ppo.config import AMOUNTS, PRESETS, PPOConfig
    from ppo.planning.plan import plan
    from train_ppo import main
    from utils.flags.parser import parse_args
    from utils.models.chunked_logprobs import FLOATS

    config = parse_args(PPOConfig, argv, PRESETS, AMOUNTS)
    of_gpus = 12 * (FLOATS["cuda"] - FLOATS["cpu"])  # float32 logits
    predicted = max(plan(config, 1).totals) - of_gpus
    with PeakMemory() as before:
        pass
    with PeakMemory() as peak:
        main(argv)
    rows = [json.loads(line) for line in (Path(config.model_save_path) / "metrics.jsonl").read_text().splitlines()]
    seconds = {part: [row[f"seconds_{part}"] for row in rows[2:]] for part in PARTS}
    print("MEASURED", json.dumps({"peak": (peak.mb - before.mb) * 2**20, "plan": predicted} | seconds))


def run(argv: list[str], **variables: str) -> dict:
    """Returns what `measure` prints, of a new process with these environment variables."""
    command, environment = [sys.executable, __file__, "--measure", *argv], os.environ | ENVIRONMENT | variables
    for name in MALLOC if "MALLOC_MMAP_THRESHOLD_" in variables else ():
        environment.pop(name)
    done = subprocess.run(command, cwd=HERE, env=environment | variables, capture_output=True, text=True)
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
    parser.add_argument("--rounds", type=int, default=3, help="of the seconds")
    parser.add_argument("--seconds_alone", action="store_true", help="leave the memory out")
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
        memory, seconds = {}, {kind: [] for kind in KINDS}
        for number in range(options.seconds_alone, options.rounds + 1):
            for kind, more in KINDS.items():
                paths = f"--policy_model_path {base} --critic_model_path {reward} --data_path {options.demo}/prompts"
                paths += f" --dtype {options.dtype} --zero_stage {options.zero_stage} --overwrite --seed {number}"
                paths += f" --gradient_checkpoint {options.gradient_checkpoint} --model_save_path {place}/run"
                words = " ".join([paths, STEPS, *more]).format(rank=options.rank).split()
                if number:
                    seconds[kind].append(run(words))
                else:
                    memory[kind] = run(words, **EXACT)
                    peak, planned = memory[kind]["peak"], memory[kind]["plan"]
                    share = f"{planned / peak - 1:+.1%}"
                    print(f"{kind}: {peak / 1e9:.2f} GB measured, {planned / 1e9:.2f} GB planned ({share})", flush=True)
    for kind, rows in seconds.items():
        parts = {name: statistics.median(x for row in rows for x in row[name]) for name in PARTS} if rows else {}
        print(f"{kind}: " + ", ".join(f"{name} {value:.2f} s" for name, value in parts.items()))


if __name__ == "__main__":
    main()
