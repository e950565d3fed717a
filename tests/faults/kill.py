"""Kills a small run again and again, and shows that nothing came of it:   python -m tests.faults.kill --kills 100

Every kill is a SIGKILL on a random rank: at a random call in the middle of a rollout, a scoring, an update, a saving,
an evaluation, an export or a rollback, or after a random number of milliseconds; or a SIGTERM in a rollout or scoring.
The run is then started again with the same command. In the end its metrics (times aside), texts and weights, final and
best, equal those of a run that nobody disturbed, bit for bit.
"""

import argparse
import random
import signal
import tempfile
from dataclasses import replace
from pathlib import Path

from data.order import order
from tests.faults.moments import LIMITS
from tests.faults.scenarios import Result, finished, run_cases
from tests.helpers.tiny_run import HELD_OUT, Inputs, assert_same_run, build_inputs, write_json

KINDS = {"one process": {"ranks": 1, "zero_stage": 0}, "two ranks, ZeRO-2": {"ranks": 2, "zero_stage": 2}}
ONCE = {"export of best/": 0, "rollback": 1, "export of final/": 3}  # place in the order of kills; 2: all other phases
COLLAPSE = 3  # step of which all prompts are FLAT
SEED, ROLLOUTS = 7, 8
FLAT = "Flat: name the number "

REWARD = f"""
def vowels(prompts, answers):
    scores = [sum(letter in "aeiou" for letter in answer) / (1 + len(answer)) for answer in answers]
    return [0.5 if p[-1]["content"].startswith({FLAT!r}) else s for p, s in zip(prompts, scores)]
"""


def collapsing(inputs: Inputs, folder: Path, steps: int) -> tuple[Inputs, dict]:
    """Inputs and flags of a run that collapses at one step, all answers of which have the same score, and goes back."""
    count = ROLLOUTS * (steps + 1)
    texts = [f"Name the number {i}." for i in range(count)]
    for i in order((COLLAPSE - 1) * ROLLOUTS, ROLLOUTS, count, SEED):
        texts[i] = f"{FLAT}{i}."
    prompts, file = folder / "prompts", folder / "flat.py"
    prompts.mkdir()
    write_json(prompts / "train.json", [[text] for text in texts])
    write_json(prompts / "valid.json", HELD_OUT)
    file.write_text(REWARD)
    flags = {"reward_fn": f"{file}:vowels", "alarm_score_std": 1e-6, "on_collapse": "rollback"}
    return replace(inputs, prompts=prompts), flags | {"seed": SEED, "num_rollouts": ROLLOUTS}


def kill_and_compare(inputs: Inputs, folder: Path, kind: str, kills: int, seed: int, phases=tuple(LIMITS)) -> int:
    """AssertionError when a run that was killed so often differs from one that was not; else how often it was.

    `phases` take turns. A run whose final/ was there when it was killed is finished, and cannot be killed again.
    """
    dice, ranks = random.Random(seed), KINDS[kind]["ranks"]
    steps = {"train_steps": 4 * kills + 2, "keep_checkpoints": 1, "save_per_step": 2, "num_eval_prompts": 2}
    inputs, flags = collapsing(inputs, folder, steps["train_steps"])
    flags |= KINDS[kind] | steps | {"patience": 0}
    victims, resumed, killed, cases = {}, 0, 0, {"undisturbed": flags}
    planned = dice.sample([phases[number % len(phases)] for number in range(kills)], kills)
    for number, phase in enumerate(sorted(planned, key=lambda phase: ONCE.get(phase, 2))):
        victim = 0 if "export" in phase else dice.randrange(ranks)  # rank 0 writes
        name = f"kill {number} in {phase.rstrip('/')}"
        victims[name] = victim
        cases[name] = flags | {"out": "killed", "fault": [victim, phase, dice.randint(1, LIMITS[phase])]}
    results = run_cases(folder, inputs, cases | {"killed": flags})
    for name, victim in victims.items():
        result = results.pop(name)
        assert result.codes[victim] in (-signal.SIGKILL, 128 + signal.SIGTERM) or is_over(result), (
            f"{name}: {result.codes}: {result.log[-3000:]}"
        )
        resumed += "resuming from" in result.log
        killed += not is_over(result)
    if not is_over(results["killed"]):
        finished(results)
    assert resumed or kills < len(phases), "no kill came late enough for a checkpoint to go on from"
    assert "rollback 1 of 3" in results["undisturbed"].log
    assert_same_run(results["killed"].out, results["undisturbed"].out, "best")
    return killed


def is_over(result: Result) -> bool:
    """Whether a run was refused because it is finished."""
    return "already holds a run, which is finished" in result.log


def main() -> None:
    """Both kinds of run, half of the kills each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        inputs = build_inputs(Path(name))
        for kind in KINDS:
            (folder := Path(name) / kind).mkdir()
            killed = kill_and_compare(inputs, folder, kind, options.kills // 2, options.seed)
            print(f"{kind}: equal bit for bit after {killed} kills", flush=True)


if __name__ == "__main__":
    main()
