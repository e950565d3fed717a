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
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from safetensors.torch import load_file

import ppo.decoding
import ppo.score
import utils.checkpoint
from tests.tiny_run import Inputs, build_inputs, read_lines, read_metrics, run_flags
from train_ppo import main as train_ppo
from utils.engine import TrainEngine

# Phase -> what to count calls of: so many of them, at most, are let through before the kill (about two steps).
PHASES = {
    "rollout": (ppo.decoding._Decoder, "look", 30),
    "scoring": (ppo.score, "_by_batch", 6),
    "update": (TrainEngine, "step", 6),
    "saving": (utils.checkpoint, "_sync", 6),
}
PATIENCE = 300  # seconds for a run to come to its end, or to its kill


def arm(phase: str, calls: int, number: int = signal.SIGKILL) -> None:
    """In a process of its own: the call number `calls` of this phase from now on begins with this signal to itself."""
    place, name, _ = PHASES[phase]
    function, left = getattr(place, name), calls

    def deadly(*args, **kwargs):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    setattr(place, name, deadly)


def start(argv: list[str], ranks: int, log: Path, kill: tuple | None) -> list[int]:
    """Forks a process a rank, which runs train_ppo.py; kill: (rank, phase, calls[, signal]). Returns their ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
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
            if kill and kill[0] == rank:
                arm(*kill[1:])
            train_ppo(argv)
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
    flags = {"train_steps": 3 * kills + 2, "checkpoint_per_step": 1, "save_per_step": 2, "num_eval_prompts": 2} | flags
    expected, out, log = folder / "undisturbed", folder / "killed", folder / "log"
    codes = wait(start(run_flags(inputs, expected, **flags), ranks, log, None))
    assert codes == [0] * ranks, f"{codes}: see {log}\n{log.read_text()[-3000:]}"
    count = collections.Counter()
    phases = list(PHASES)
    for number in range(kills):
        phase = phases[number % len(phases)]
        kill = (dice.randrange(ranks), phase, dice.randint(1, PHASES[phase][2]))
        codes = wait(start(run_flags(inputs, out, **flags), ranks, log, kill))
        assert codes[kill[0]] == -signal.SIGKILL, f"{kill} -> {codes}: see {log}\n{log.read_text()[-3000:]}"
        count[phase] += 1
    codes = wait(start(run_flags(inputs, out, **flags), ranks, log, None))
    assert codes == [0] * ranks, f"{codes}: see {log}\n{log.read_text()[-3000:]}"
    check_equal(out, expected)
    return count


def main() -> None:
    """Both kinds of run, half of the kills each; a line of results each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)  # before the first tensor: a process that has threads must not be forked
    with tempfile.TemporaryDirectory() as folder:
        inputs = build_inputs(Path(folder))
        for name, ranks, flags in (("one process", 1, {"zero_stage": 0}), ("two ranks, ZeRO-2", 2, {"zero_stage": 2})):
            started = time.perf_counter()
            place = Path(folder) / name.replace(" ", "_")
            place.mkdir()
            count = kill_and_compare(inputs, place, ranks, options.kills // 2, options.seed, **flags)
            phases = ", ".join(f"{phase} {number}" for phase, number in sorted(count.items()))
            print(f"{name}: {sum(count.values())} kills ({phases}), equal bit for bit; "
                  f"{time.perf_counter() - started:.0f} s")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
