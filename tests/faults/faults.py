"""What can befall a run: functions that are called in each of its processes with its rank, before it begins."""

import itertools
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import data.prompts
import ppo.build
import ppo.decoding.scheduler
import ppo.models
import ppo.rollout
import ppo.run
import ppo.score
import ppo.update
import ppo.vllm_sampler
import utils.models.export
import utils.run.checkpoint
import utils.run.lock
import utils.run.state_file
from utils.engine.engine import TrainEngine
from utils.errors import UserError
from utils.run.checkpoint import CheckpointWriter
from utils.run.stop_signal import GRACE

VICTIM = 1  # the rank that faults happen to
NAN = float("nan")
Fault = Callable[[int], None]

# Phase -> what to count calls of, and at which of them, at most, a kill comes (within about four steps).
PHASES = {
    "rollout": (ppo.decoding.scheduler.Decoder, "_free_ended", 60),
    "scoring": (ppo.score, "_by_batch", 12),
    "update": (TrainEngine, "apply", 16),
    "saving": (os, "fsync", 24),  # of files by a thread, of the folder that then gets its name by the main thread
}


def nothing(*_) -> None:
    """No fault."""


def before_calls(owner, name: str, acts: dict[int, Callable[[], None]]) -> None:
    """The n-th call of a function begins with acts[n]()."""
    function, numbers = getattr(owner, name), itertools.count(1)

    def counted(*args, **kwargs):
        acts.get(next(numbers), nothing)()
        return function(*args, **kwargs)

    setattr(owner, name, counted)


def send(number: int) -> None:
    """A signal to this process."""
    os.kill(os.getpid(), number)


def once_loaded(install: Callable[[], None]) -> None:
    """Calls `install` when the run has its models: before that the policy is decoded too, to see if it can be."""
    load = ppo.build.load_models

    def loaded(*args):
        models = load(*args)
        install()
        return models

    ppo.build.load_models = loaded


def at_call(victim: int, phase: str, calls: int, number: int = signal.SIGKILL) -> Fault:
    """On the rank `victim`, that call of this phase begins with this signal to itself."""
    install = partial(before_calls, *PHASES[phase][:2], {calls: partial(send, number)})

    def begin(rank: int) -> None:
        if rank == victim:
            once_loaded(install) if phase == "rollout" else install()

    return begin


def in_step_2(phase: str, calls: int, number: int, start: tuple = (ppo.run.Run, "next_prompts")) -> Fault:
    """On the victim, that call of this phase after the second call of `start` begins with this signal to itself."""
    install = partial(before_calls, *PHASES[phase][:2], {calls: partial(send, number)})
    return lambda rank: before_calls(*start, {2: install}) if rank == VICTIM else None


def in_vllm(number: int) -> Fault:
    """On the victim, the first question of vLLM's in step 2 whether to stop begins with this signal to itself."""
    install = partial(before_calls, ppo.vllm_sampler.VLLMSampler, "_stopped", {1: partial(send, number)})
    return lambda rank: before_calls(ppo.run.Run, "next_prompts", {2: install}) if rank == VICTIM else None


def stall(owner, name: str, victim: int = VICTIM) -> Fault:
    """The victim's first call of this function takes ten minutes."""

    def begin(rank: int) -> None:
        if rank == victim:
            before_calls(owner, name, {1: partial(time.sleep, 600)})

    return begin


def bad_minibatch(function: str, loss: str, spoil: Callable[[Callable], Callable]) -> Fault:
    """In the fourth minibatch (the second of step 2), which `function` works on, the victim's loss is spoilt.

    All ranks compare the weights before and after steps that are not made.
    """
    good = getattr(ppo.update, loss)

    def begin(rank: int) -> None:
        ppo.update.step_all = compared(ppo.update.step_all)
        if rank == VICTIM:
            put = partial(setattr, ppo.update, loss)
            before_calls(ppo.update, function, {4: partial(put, spoil(good)), 5: partial(put, good)})

    return begin


def compared(step_all: Callable) -> Callable:
    """Fails when a step that was not made has changed weights."""

    def steps(learners, problem=None):
        before = [learner.engine.full_state_dict() for learner in learners]
        norms, problem = step_all(learners, problem)
        if problem:
            for old, learner in zip(before, learners, strict=True):
                assert all(torch.equal(tensor, old[name]) for name, tensor in learner.engine.full_state_dict().items())
            print("weights compared: the same", flush=True)
        return norms, problem

    return steps


def nan_loss(good: Callable) -> Callable:
    """The loss is NaN."""

    def objective(*args):
        loss, sums = good(*args)
        return loss * NAN, sums

    return objective


def nan_gradient(place: int) -> Callable[[Callable], Callable]:
    """The loss is as it should be, and NaN flows back from it into its argument at `place`."""

    def spoil(good: Callable) -> Callable:
        def objective(*args):
            args[place].register_hook(lambda gradient: gradient * NAN)
            return good(*args)

        return objective

    return spoil


def nan_score(rank: int) -> None:
    """In the second step one score of the victim's is NaN."""
    score, numbers = ppo.score.score, itertools.count(1)

    def broken(*args):
        scores = score(*args)
        if next(numbers) == 2:
            scores.scores[1] = NAN
        return scores

    if rank == VICTIM:
        ppo.score.score = broken


def empty_responses(rank: int) -> None:
    """All responses of the victim have no token, not even EOS."""
    run, sample = ppo.decoding.scheduler.Decoder.run, ppo.decoding.scheduler.sample

    def install() -> None:
        ppo.decoding.scheduler.Decoder.run = lambda *args: [row[:0] for row in run(*args)]
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
    write, save = utils.run.state_file.write_file, CheckpointWriter.save

    def fills(file, pieces) -> dict:
        if "step_2" in file.name and "critic" in file.name:
            fill(Path(file.name).parents[3], leave=2**16)  # some lines of metrics
        return write(file, pieces)

    def clears(writer: CheckpointWriter, state: dict, *args, **kwargs) -> None:
        if state["step"] == 4:
            (Path(writer._folder).parents[1] / "filler").unlink()
        save(writer, state, *args, **kwargs)

    utils.run.state_file.write_file, CheckpointWriter.save = fills, clears


def disk_is_full(rank: int) -> None:
    """After the checkpoint of step 2 there is no room left, not for a line of metrics."""
    save = CheckpointWriter.save

    def fills(writer: CheckpointWriter, state: dict, *args, **kwargs) -> None:
        save(writer, state, *args, **kwargs)
        if state["step"] == 2:
            writer.finish()
            fill(Path(writer._folder).parents[1], leave=0)

    CheckpointWriter.save = fills


def disk_fills_in_an_export(number: int, rank: int) -> None:
    """Something else takes the room before the model of this number is written; before the next one it goes."""
    folder, numbers = utils.models.export.atomic_folder, itertools.count(1)

    def fills(path: str):
        disk = Path(path).parents[1]
        if next(numbers) == number:
            fill(disk, leave=2**16)  # some lines of metrics
        else:
            (disk / "filler").unlink(missing_ok=True)
        return folder(path)

    utils.models.export.atomic_folder = fills


def insistent_launcher(rank: int) -> None:
    """In step 3 the victim gets SIGTERM and SIGINT at once, as if by two launchers, and again much later."""

    def insist() -> None:
        for pause in (0.0, GRACE + 0.5):
            time.sleep(pause)
            for number in (signal.SIGTERM, signal.SIGINT):
                print(number.name, flush=True)
                send(number)

    if rank == VICTIM:
        before_calls(TrainEngine, "apply", {9: insist})


def slow_disk(rank: int, begin: Callable[[], None] = nothing) -> None:
    """The thread that writes a rank's files takes longer than a step; in the first checkpoint it calls `begin`."""
    sync, numbers = os.fsync, itertools.count(1)

    def slowly(handle: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            if next(numbers) == 1:
                begin()
            time.sleep(0.7)
        sync(handle)

    os.fsync = slowly


def signal_while_writing(rank: int) -> None:
    """SIGTERM to the victim while the first checkpoint is being written."""
    slow_disk(rank, partial(send, signal.SIGTERM) if rank == VICTIM else nothing)


def small_chunks(rank: int) -> None:
    """Room for the logits of four tokens at once, as a large vocabulary has for a few hundred; on both ranks."""
    ppo.models.CHUNK_ELEMENTS = 4 * 400


def no_room(rank: int) -> None:
    """Whole weights find no room beside their shards, as with a large model under ZeRO-3."""
    TrainEngine.fits_gathered = lambda self: False


def damaged_model(rank: int) -> None:
    """The victim cannot load its critic, when the other rank goes on to a collective."""

    def refuse() -> None:
        raise UserError("--critic_model_path is damaged")

    if rank == VICTIM:
        before_calls(ppo.models, "load_scalar", {1: refuse})


def shared_late(rank: int) -> None:
    """The victim sees the folder `run` of the other rank two seconds after the start."""
    if rank == VICTIM:
        threading.Timer(2.0, lambda: Path("run").symlink_to("../first/run")).start()


def never_shared(rank: int) -> None:
    """The victim waits for one second only to see the folder of the run."""
    utils.run.lock.SEEN = 1.0


FAULTS = {
    f"{number.name} in {phase}": at_call(VICTIM, phase, 2, number)
    for phase in PHASES
    for number in (signal.SIGKILL, signal.SIGSTOP)
}
FAULTS |= {
    "SIGTERM in scoring": in_step_2("scoring", 2, signal.SIGTERM),
    "SIGHUP in update": in_step_2("update", 2, signal.SIGHUP),
    "SIGUSR1 in rollout": in_step_2("rollout", 2, signal.SIGUSR1),
    "SIGTERM in evaluation": in_step_2("rollout", 2, signal.SIGTERM, (ppo.run, "evaluate")),
}
FAULTS |= {f"{number.name} in vLLM": in_vllm(number) for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP)}
FAULTS |= {
    "stall in loading": stall(ppo.models, "load_scalar"),
    "stall in encoding": stall(data.prompts, "encode_prompts", victim=0),  # which reads for both
    "stall in saving": stall(utils.run.checkpoint, "write_files"),
    "NaN loss": bad_minibatch("policy_backward", "policy_objective", nan_loss),
    "NaN gradient": bad_minibatch("policy_backward", "policy_objective", nan_gradient(1)),
    "NaN critic gradient": bad_minibatch("critic_backward", "value_loss", nan_gradient(0)),
}
_OTHERS = [nan_score, empty_responses, small_chunks, no_room, disk_fills_in_a_save, disk_is_full, insistent_launcher]
FAULTS |= {
    fault.__name__.replace("_", " "): fault
    for fault in (*_OTHERS, slow_disk, signal_while_writing, damaged_model, shared_late, never_shared)
}
FAULTS |= {f"disk fills in export {number}": partial(disk_fills_in_an_export, number) for number in (2, 3)}
