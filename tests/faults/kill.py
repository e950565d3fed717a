"""Kills a small run again and again, and shows that nothing came of it:   python -m tests.faults.kill --kills 60

Every kill is a SIGKILL in the middle of a rollout, a scoring, an update or a saving, at a random call of it and on a
random rank. The run is then started again with the same command. In the end its metrics (times aside), texts and final
weights have to equal those of a run that nobody disturbed, bit for bit.
"""

import argparse
import collections
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - takes seconds, which every engine in a fork would pay
import torch
from safetensors.torch import load_file
from tqdm import tqdm

import ppo.build
import ppo.decoding.scheduler
import ppo.score
from tests.helpers.tiny_run import Inputs, build_inputs, read_lines, read_metrics, run_flags
from train_ppo import main as train_ppo
from utils.engine.engine import TrainEngine
from utils.launcher import free_port

# Phase -> what to count calls of, and at which of them, at most, the kill comes (within about two steps).
PHASES = {
    "rollout": (ppo.decoding.scheduler._Decoder, "look", 30),
    "scoring": (ppo.score, "_by_batch", 6),
    "update": (TrainEngine, "step", 6),
    "saving": (os, "fsync", 8),  # of files by a thread, of the folder that then gets its name by the main thread
}
PATIENCE = 300  # seconds for a run to come to its end, or to its kill


def at_call(victim: int, phase: str, calls: int, number: int = signal.SIGKILL) -> Callable[[int], None]:
    """A fault for `start`: on the rank `victim`, that call of this phase begins with this signal to itself."""
    place, name, _ = PHASES[phase]
    function, left = getattr(place, name), calls

    def deadly(*args, **kwargs):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    def install() -> None:
        setattr(place, name, deadly)

    def begin(rank: int) -> None:
        if rank == victim and phase == "rollout":
            once_loaded(install)
        elif rank == victim:
            install()

    return begin


def once_loaded(install: Callable[[], None]) -> None:
    """Calls `install` when the run has its models: before that the policy is decoded too, to see if it can be."""
    load = ppo.build.load_models

    def loaded(*args):
        models = load(*args)
        install()
        return models

    ppo.build.load_models = loaded


def nothing(rank: int) -> None:
    """No fault."""


def start(run: Callable[[], None], ranks: int, log: Path, fault: Callable[[int], None] = nothing) -> list[int]:
    """Forks a process a rank, each of which calls `fault` with its rank and then `run`. Returns their ids."""
    port, children = free_port(), []
    for rank in range(ranks):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            if ranks > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            torch.set_num_threads(1)
            tqdm.set_lock(threading.RLock())  # its own is shared by forked processes: who is killed would keep it
            fault(rank)
            run()
            code = 0
        except SystemExit as stopped:
            code = stopped.code
        except BaseException:  # noqa: BLE001 - whatever it is, this process must not go on as the parent
            traceback.print_exc()
        finally:
            os._exit(code)
    return children


def wait(children: list[int], patience: float = 0.0) -> list[int]:
    """Exit codes, negative for signals. `patience` seconds after one has ended badly the others are killed, as a

    launcher does.
    """
    codes: dict[int, int] = {}
    deadline = time.monotonic() + PATIENCE
    while len(codes) < len(children):
        for child in set(children) - codes.keys():
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
        if any(codes.values()):
            deadline = min(deadline, time.monotonic() + patience)
        if time.monotonic() > deadline:
            for child in set(children) - codes.keys():
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[child] for child in children]


def check_equal(out: Path, expected: Path) -> None:
    """AssertionError where anything differs by a bit."""
    assert read_metrics(out) == read_metrics(expected)
    assert read_lines(out / "samples.jsonl") == read_lines(expected / "samples.jsonl")
    weights, others = (load_file(folder / "final" / "model.safetensors") for folder in (out, expected))
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, others[name]), name


def kill_and_compare(inputs: Inputs, folder: Path, ranks: int, kills: int, seed: int, **flags) -> collections.Counter:
    """Kills of each phase. flags: of the run, beyond those of a small one. AssertionError when the runs differ."""
    dice = random.Random(seed)
    flags = {"train_steps": 2 * kills + 2, "checkpoint_per_step": 1, "save_per_step": 2, "num_eval_prompts": 2} | flags
    expected, out, log = folder / "undisturbed", folder / "killed", folder / "log"

    def codes_of(run: Path, *fault) -> list[int]:
        return wait(start(lambda: train_ppo(run_flags(inputs, run, **flags)), ranks, log, *fault))

    codes = codes_of(expected)
    assert codes == [0] * ranks, f"{codes}: see {log}\n{log.read_text()[-3000:]}"
    count = collections.Counter()
    phases = list(PHASES)
    for number in range(kills):
        phase = phases[number % len(phases)]
        victim, calls = dice.randrange(ranks), dice.randint(1, PHASES[phase][2])
        codes = codes_of(out, at_call(victim, phase, calls))
        assert codes[victim] == -signal.SIGKILL, f"{phase}, {victim} -> {codes}: see {log}\n{log.read_text()[-3000:]}"
        count[phase] += 1
    codes = codes_of(out)
    assert codes == [0] * ranks, f"{codes}: see {log}\n{log.read_text()[-3000:]}"
    check_equal(out, expected)
    return count


def main() -> None:
    """Both kinds of run, half of the kills each; a table of results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)  # before the first tensor: a process that has threads must not be forked
    with tempfile.TemporaryDirectory() as folder:
        inputs = build_inputs(Path(folder))
        print(f"| killed in | {' | '.join(PHASES)} | then | seconds |\n|{'---|' * (len(PHASES) + 3)}", flush=True)
        for name, ranks, stage in (("one process", 1, 0), ("two ranks, ZeRO-2", 2, 2)):
            started = time.perf_counter()
            place = Path(folder) / f"{ranks}"
            place.mkdir()
            count = kill_and_compare(inputs, place, ranks, options.kills // 2, options.seed, zero_stage=stage)
            cells = [str(count[phase]) for phase in PHASES]
            seconds = time.perf_counter() - started
            print(f"| {name} | {' | '.join(cells)} | equal bit for bit | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
