"""Small runs that something befalls, one after the other, in processes forked from this one:

    python -m tests.faults.scenarios CASES.json

A case: {"ranks": 2, "fault": a name in FAULTS or null, "patience": seconds, "log": file, "argv": of train_ppo.py}.
Prints the exit codes of each as JSON.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

import ppo.rollout
import ppo.score
import ppo.update
import utils.checkpoint
from tests.faults.kill import PHASES, at_call, nothing, start, wait
from train_ppo import main as train_ppo

VICTIM = 1  # the rank that faults happen to
NAN = float("nan")
Fault = Callable[[int], None]  # called in each process with its rank


def bad_minibatch(objective: Callable[[Callable], Callable]) -> Fault:
    """In the fourth minibatch (the second of step 2) one rank's policy loss comes from another function."""
    backward, calls = ppo.update.policy_backward, 0
    good = ppo.update.policy_objective

    def counted(*args):
        nonlocal calls
        calls += 1
        ppo.update.policy_objective = objective(good) if calls == 4 else good
        return backward(*args)

    return lambda rank: setattr(ppo.update, "policy_backward", counted) if rank == VICTIM else None


def nan_loss(good: Callable) -> Callable:
    """The loss and what is reported of it is NaN."""

    def objective(*args):
        loss, sums = good(*args)
        return loss * NAN, sums | {"policy_loss": sums["policy_loss"] * NAN}

    return objective


def nan_gradient(good: Callable) -> Callable:
    """The loss is as it should be, and NaN flows back from it."""

    def objective(part, logprobs, *args):
        logprobs.register_hook(lambda gradient: gradient * NAN)
        return good(part, logprobs, *args)

    return objective


def nan_score(rank: int) -> None:
    """In the second step one score of the victim's is NaN."""
    score, calls = ppo.score.score, 0

    def broken(*args):
        nonlocal calls
        calls += 1
        scores = score(*args)
        if calls == 2:
            scores.scores[1] = NAN
        return scores

    if rank == VICTIM:
        ppo.score.score = broken


def empty_responses(rank: int) -> None:
    """All responses of the victim have no token, not even EOS."""
    decode, sample = ppo.rollout._decode, ppo.rollout.sample

    def empty(*args):
        return [row[:0] for row in decode(*args)]

    if rank == VICTIM:
        ppo.rollout._decode = empty
        ppo.rollout.sample = lambda logits, *args: torch.full_like(sample(logits, *args), 2)  # EOS at once


def full_disk(rank: int) -> None:
    """While the checkpoint of step 2 is written, something else fills the disk; before that of step 4 it goes."""
    sync, save, saves, filler = utils.checkpoint._sync, utils.checkpoint.save, 0, None

    def fills(path: str) -> None:
        nonlocal filler
        if saves == 2 and not filler:
            filler = Path(path).parents[3] / "filler"
            with open(filler, "wb", buffering=0) as file:
                try:
                    while file.write(bytes(4096)):
                        pass
                except OSError:
                    file.truncate(file.tell() - 2**16)  # room for some lines of metrics
        sync(path)

    def counted(*args):
        nonlocal saves
        saves += 1
        if saves == 4:
            filler.unlink()
        return save(*args)

    utils.checkpoint._sync, utils.checkpoint.save = fills, counted


FAULTS = {
    f"{number.name} in {phase}": at_call(VICTIM, phase, 2, number)
    for phase in PHASES
    for number in (signal.SIGKILL, signal.SIGSTOP)
}
FAULTS |= {"NaN loss": bad_minibatch(nan_loss), "NaN gradient": bad_minibatch(nan_gradient), "NaN score": nan_score}
FAULTS |= {"empty responses": empty_responses, "full disk": full_disk}


def main() -> None:
    """All cases of the file."""
    torch.set_num_threads(1)  # before the first tensor: a process that has threads must not be forked
    codes = []
    for case in json.loads(Path(sys.argv[1]).read_text()):
        fault = FAULTS[case["fault"]] if case["fault"] else nothing
        children = start(lambda argv=case["argv"]: train_ppo(argv), case["ranks"], Path(case["log"]), fault)
        codes.append(wait(children, case["patience"]))
    print(json.dumps(codes))


if __name__ == "__main__":
    main()
