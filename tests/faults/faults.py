"""What can befall a run: functions that are called in each of its processes with its rank, before it begins."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

import ppo.decoding.scheduler
import ppo.models
import ppo.score
import ppo.update
import utils.run.checkpoint
from tests.faults.kill import PHASES, at_call, once_loaded
from utils.engine.engine import TrainEngine
from utils.run.checkpoint import CheckpointWriter
from utils.run.stop_signal import GRACE

VICTIM = 1  # the rank that faults happen to
NAN = float("nan")
Fault = Callable[[int], None]


def bad_minibatch(function: str, loss: str, objective: Callable[[Callable], Callable]) -> Fault:
    """In the fourth minibatch (the second of step 2), which `function` works on, one rank's loss is another.

    All ranks compare the weights before and after steps that are not made.
    """
    backward, good, calls = getattr(ppo.update, function), getattr(ppo.update, loss), 0

    def counted(*args):
        nonlocal calls
        calls += 1
        setattr(ppo.update, loss, objective(good) if calls == 4 else good)
        return backward(*args)

    def begin(rank: int) -> None:
        ppo.update.step_all = compared(ppo.update.step_all)
        if rank == VICTIM:
            setattr(ppo.update, function, counted)

    return begin


def compared(step_all: Callable) -> Callable:
    """Fails when a step that was not made has changed weights."""

    def steps(learners, problem):
        before = [learner.engine.full_state_dict() for learner in learners]
        norms, problem = step_all(learners, problem)
        if problem:
            for old, learner in zip(before, learners, strict=True):
                for name, tensor in learner.engine.full_state_dict().items():
                    assert torch.equal(tensor, old[name]), name
            print("weights compared: the same", flush=True)
        return norms, problem

    return steps


def nan_loss(good: Callable) -> Callable:
    """The loss is NaN."""

    def objective(*args):
        loss, sums = good(*args)
        return loss * NAN, sums

    return objective


def nan_gradient(good: Callable) -> Callable:
    """The loss is as it should be, and NaN flows back from it."""

    def objective(part, logprobs, *args):
        logprobs.register_hook(lambda gradient: gradient * NAN)
        return good(part, logprobs, *args)

    return objective


def nan_value_gradient(good: Callable) -> Callable:
    """The value loss is as it should be, and NaN flows back from it."""

    def loss(values, *args):
        values.register_hook(lambda gradient: gradient * NAN)
        return good(values, *args)

    return loss


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
    run, sample = ppo.decoding.scheduler.Decoder.run, ppo.decoding.scheduler.sample

    def empty(*args):
        return [row[:0] for row in run(*args)]

    def install() -> None:
        ppo.decoding.scheduler.Decoder.run = empty
        ppo.decoding.scheduler.sample = lambda logits, *args: torch.full_like(sample(logits, *args), 2)  # EOS at once

    if rank == VICTIM:
        once_loaded(install)


def fill(disk: Path, leave: int) -> None:
    """Takes all room of a small disk of its own but for some bytes, with a file `filler`."""
    assert disk.is_mount() and shutil.disk_usage(disk).total <= 2**26, f"{disk} is no disk that a test may fill"
    with open(disk / "filler", "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            file.truncate(max(file.tell() - leave, 0))


def disk_fills_in_a_save(rank: int) -> None:
    """Between two files of the checkpoint of step 2 something else takes the room; before that of step 4 it goes."""
    write, save = utils.run.checkpoint.write_file, CheckpointWriter.save

    def fills(path: str, pieces) -> dict:
        if "step_2" in path and "critic" in path:
            fill(Path(path).parents[3], leave=2**16)  # some lines of metrics
        return write(path, pieces)

    def clears(writer: CheckpointWriter, state: dict, *args, **kwargs) -> None:
        if state["step"] == 4:
            (Path(writer._folder).parents[1] / "filler").unlink()
        save(writer, state, *args, **kwargs)

    utils.run.checkpoint.write_file, CheckpointWriter.save = fills, clears


def disk_is_full(rank: int) -> None:
    """After the checkpoint of step 2 there is no room left, not for a line of metrics."""
    save = CheckpointWriter.save

    def fills(writer: CheckpointWriter, state: dict, *args, **kwargs) -> None:
        save(writer, state, *args, **kwargs)
        if state["step"] == 2:
            writer.finish()
            fill(Path(writer._folder).parents[1], leave=0)

    CheckpointWriter.save = fills


def two_signals(rank: int) -> None:
    """SIGTERM in step 3, and again."""
    step, calls = TrainEngine.step, 0

    def signalled(*args):
        nonlocal calls
        calls += 1
        if calls in (9, 10):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    TrainEngine.step = signalled


def insistent_launcher(rank: int) -> None:
    """In step 3 the victim gets SIGTERM, once more at once, as when two launchers pass it on, and again much later."""
    step, calls = TrainEngine.step, 0

    def signalled(*args):
        nonlocal calls
        calls += 1
        if calls == 9:
            for pause in (0.0, 0.0, GRACE + 0.5):
                time.sleep(pause)
                print("SIGTERM", flush=True)
                os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    if rank == VICTIM:
        TrainEngine.step = signalled


def slow_disk(rank: int, begin: Callable[[], None] = lambda: None) -> None:
    """The thread that writes a rank's files takes longer than a step; in the first checkpoint it calls `begin`."""
    sync, calls = os.fsync, 0

    def slowly(handle: int) -> None:
        nonlocal calls
        if threading.current_thread() is not threading.main_thread():
            calls += 1
            if calls == 1:
                begin()
            time.sleep(0.7)
        sync(handle)

    os.fsync = slowly


def signal_while_writing(rank: int) -> None:
    """SIGTERM to the victim while the first checkpoint is being written."""
    slow_disk(rank, lambda: os.kill(os.getpid(), signal.SIGTERM) if rank == VICTIM else None)


def small_chunks(rank: int) -> None:
    """Room for the logits of four tokens at once, as a large vocabulary has for a few hundred; on both ranks."""
    ppo.models.CHUNK_ELEMENTS = 4 * 400


def no_room(rank: int) -> None:
    """Whole weights find no room beside their shards, as with a large model under ZeRO-3."""
    TrainEngine.fits_gathered = lambda self: False


FAULTS = {
    f"{number.name} in {phase}": at_call(VICTIM, phase, 2, number)
    for phase in PHASES
    for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM)
}
FAULTS |= {
    "NaN loss": bad_minibatch("policy_backward", "policy_objective", nan_loss),
    "NaN gradient": bad_minibatch("policy_backward", "policy_objective", nan_gradient),
    "NaN critic gradient": bad_minibatch("critic_backward", "value_loss", nan_value_gradient),
    "NaN score": nan_score,
}
FAULTS |= {
    "empty responses": empty_responses,
    "small chunks": small_chunks,
    "no room": no_room,
    "disk fills in a save": disk_fills_in_a_save,
}
FAULTS |= {"disk is full": disk_is_full, "two signals": two_signals, "insistent launcher": insistent_launcher}
FAULTS |= {"slow disk": slow_disk, "signal while writing": signal_while_writing}
