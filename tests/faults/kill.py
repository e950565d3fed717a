"""Kills a small run again and again, and shows that nothing came of it:   python -m tests.faults.kill --kills 60

Every kill is a SIGKILL in the middle of a rollout, a scoring, an update or a saving, at a random call of it and on a
random rank. The run is then started again with the same command. In the end its metrics (times aside), texts and final
weights equal those of a run that nobody disturbed, bit for bit.
"""

import argparse
import random
import signal
import tempfile
from pathlib import Path

from tests.faults.faults import PHASES
from tests.faults.scenarios import finished, run_cases
from tests.helpers.tiny_run import Inputs, assert_same_run, build_inputs

KINDS = {"one process": {"ranks": 1, "zero_stage": 0}, "two ranks, ZeRO-2": {"ranks": 2, "zero_stage": 2}}


def kill_and_compare(inputs: Inputs, folder: Path, kind: str, kills: int, seed: int) -> None:
    """AssertionError when a run that was killed so often differs from one that was not."""
    dice, ranks = random.Random(seed), KINDS[kind]["ranks"]
    steps = {"train_steps": 4 * kills + 2, "keep_checkpoints": 1, "save_per_step": 2, "num_eval_prompts": 2}
    flags, victims, resumed = KINDS[kind] | steps | {"patience": 0}, {}, 0
    cases = {"undisturbed": flags}
    for number in range(kills):
        phase, victim = list(PHASES)[number % len(PHASES)], dice.randrange(ranks)
        name = f"kill {number} in {phase}"
        victims[name] = victim
        cases[name] = flags | {"out": "killed", "fault": [victim, phase, dice.randint(1, PHASES[phase][2])]}
    results = run_cases(folder, inputs, cases | {"killed": flags})
    for name, victim in victims.items():
        result = results.pop(name)
        assert result.codes[victim] == -signal.SIGKILL, f"{name}: {result.codes}: {result.log[-3000:]}"
        resumed += "resuming from" in result.log
    finished(results)
    assert resumed or kills < len(PHASES), "no kill came late enough for a checkpoint to go on from"
    assert_same_run(results["killed"].out, results["undisturbed"].out)


def main() -> None:
    """Both kinds of run, half of the kills each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        inputs = build_inputs(Path(name))
        for kind in KINDS:
            (folder := Path(name) / kind).mkdir()
            kill_and_compare(inputs, folder, kind, options.kills // 2, options.seed)
            print(f"{kind}: equal bit for bit after {options.kills // 2} kills", flush=True)


if __name__ == "__main__":
    main()
