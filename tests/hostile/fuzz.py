"""Fuzzes the readers of a start:   python -m tests.hostile.fuzz [--count 20000] [--seed 0] [--start 0] [--only TARGET]

Changes one file of a sound folder in a way that respects its structure, makes hashes right again, and calls what a
trainer calls. The outcome must be: accepted, or a UserError of one line. Anything else is a finding, and so are more
than 20 s or 2 GB, a process that ends, and code that runs: files, processes or connections made. Two processes work.
A finding is printed with the command that repeats it. Exit code 1 if there is one.
"""

import argparse
import gc
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

from tests.hostile.case import CODE_RAN, MEMORY
from tests.hostile.changes import rehash
from tests.hostile.materials import Materials
from tests.hostile.run import BYTES, SECONDS, forked, limit_memory
from tests.hostile.targets import STEP, TARGETS, Resume, Target, add_sources
from utils.errors import UserError

ROUNDS = 400  # mutations of a process, after which another one takes over
WORKERS = 2
ACCEPTED: set[int] = set()  # numbers of mutations that were read without an error
CODE = (
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "shutil.rmtree",
)


def target_of(rng: random.Random, only: str | None) -> Target:
    """The target of a mutation. only: a part of its name."""
    chosen = [target for target in TARGETS if not only or only in f"{target.source}/{target.file}"]
    return rng.choices(chosen, [target.share for target in chosen])[0]


class Watch:
    """Notes what a reader must not do: it writes, starts processes or asks other machines."""

    def __init__(self):
        self.seen: list[str] = []
        self.on = False
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if (
            event == "open"
            and isinstance(arguments[1], str)
            and set(arguments[1]) & set("wax+")
            and arguments[0] != os.devnull
        ):
            self.seen.append(f"open {arguments[:2]}")
        elif event in CODE:
            self.seen.append(f"{event} {arguments}"[:200])


class Reader:
    """One process's copies of the folders, and the objects that readers need."""

    def __init__(self, materials: dict[str, Path], folder: Path):
        self.folder, self.watch, self.accepted = folder, Watch(), False
        shutil.rmtree(folder, ignore_errors=True)
        self.folders = {target.source: folder / target.source for target in TARGETS}
        for name, path in self.folders.items():
            shutil.copytree(materials[name], path)
        self._model, self._resume = materials["policy"], None
        os.chdir(folder)

    def problem(self, target: Target, rng: random.Random) -> str | None:
        """What a mutation leads to that it must not, or None."""
        place = self.folders[target.source]
        sound = {
            path: path.read_bytes()
            for path in {place / target.file, *place.glob("checkpoints/*/manifest.json"), *place.glob("*.jsonl")}
        }
        content = target.mutate(rng, sound[place / target.file])
        read = target.read
        if read is Resume:
            read = self._resume = self._resume or Resume(self._model)
        (place / target.file).write_bytes(content)
        if target.file.startswith(STEP) and "manifest" not in target.file:
            rehash(place / STEP)
        self.watch.seen, self.watch.on = [], target.source != "ppo_run" or "jsonl" not in target.file
        try:
            found = self._outcome(lambda: read(place))
            if not found and not self.accepted and content == sound[place / target.file]:
                found = (
                    "a sound folder is refused"  # a few mutations change nothing: they show that the rest is in order
                )
            return found
        finally:
            self.watch.on = False
            for path, before in sound.items():
                path.write_bytes(before)

    def _outcome(self, read) -> str | None:
        found, self.accepted = None, False
        try:
            read()
            self.accepted = True
        except UserError as error:
            text = str(error)
            if len(text.splitlines()) != 1:
                found = f"not one line: {text[:300]!r}"
            elif MEMORY.search(text):
                found = f"asks for memory: {text[:300]}"
        except BaseException as error:  # noqa: BLE001 - libraries raise what is no Exception, too
            own = [
                frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename
            ]
            where = f"{Path(own[-1].filename).name}:{own[-1].lineno} {own[-1].name}" if own else ""
            found = f"{type(error).__name__} at {where}: {str(error)[:200]!r}"
        self.watch.on = False
        if self.watch.seen:
            found = f"does {self.watch.seen[0]}"
        if (self.folder / CODE_RAN).exists():
            (self.folder / CODE_RAN).unlink()
            found = "code ran"
        return found


@dataclass
class Worker:
    """A process that reads mutations. current: the one that it is at; since: when it began, by time.monotonic()."""

    pid: int
    pipe: int
    todo: list[int]
    since: float
    current: int | None = None
    buffer: bytes = b""


def start(materials: dict[str, Path], folder: Path, todo: list[int], options: argparse.Namespace) -> Worker:
    """Forks a process for the first mutations of `todo`."""
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return Worker(pid, read, todo, time.monotonic())
    try:
        os.close(read)
        sink = os.open(os.devnull, os.O_RDWR)
        for handle in (0, 1, 2):
            os.dup2(sink, handle)
        sys.dont_write_bytecode = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        reader = Reader(materials, folder)
        limit_memory()
        low = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for i in todo[:ROUNDS]:
            os.write(write, f"{i}\n".encode())
            rng = random.Random(f"{options.seed}/{i}")
            found = reader.problem(target_of(rng, options.only), rng)
            used = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - low)
            if used > BYTES and not found:
                found = f"{used / 1e9:.1f} GB"
            os.write(write, json.dumps([i, found, reader.accepted]).encode() + b"\n")
            if used > BYTES:
                break
    except BaseException:  # noqa: BLE001 - this process must not go on as the parent
        os.write(write, json.dumps([-1, traceback.format_exc()[-900:], False]).encode() + b"\n")
    finally:
        os._exit(0)


def take(worker: Worker, findings: dict[int, str]) -> bool:
    """Reads what a process has written. Returns whether it has ended."""
    data = os.read(worker.pipe, 1 << 16)
    worker.buffer += data
    *lines, worker.buffer = worker.buffer.split(b"\n")
    for line in lines:
        worker.since = time.monotonic()
        content = json.loads(line)
        if isinstance(content, int):
            worker.current = content
            continue
        number, found, accepted = content
        worker.current = None
        ACCEPTED.update([number] if accepted else [])
        if number in worker.todo:
            worker.todo.remove(number)
        if found:
            findings[number] = found
    return not data


def run(options: argparse.Namespace, materials: dict[str, Path], folder: Path) -> dict[int, str]:
    """Number of a mutation -> what is wrong, for all mutations with something wrong."""
    findings: dict[int, str] = {}
    numbers = range(options.start, options.start + options.count)
    workers = [start(materials, folder / f"worker_{k}", list(numbers[k::WORKERS]), options) for k in range(WORKERS)]
    while workers:
        pipes = select.poll()
        for worker in workers:
            pipes.register(worker.pipe, select.POLLIN | select.POLLHUP)
        ready = [pipe for pipe, _ in pipes.poll(1000)]
        for worker in list(workers):
            hung = worker.current is not None and time.monotonic() - worker.since > SECONDS
            if hung:
                os.kill(worker.pid, signal.SIGKILL)
            if not hung and (worker.pipe not in ready or not take(worker, findings)):
                continue
            _, status = os.waitpid(worker.pid, 0)
            os.close(worker.pipe)
            if worker.current is not None:
                findings[worker.current] = (
                    f"hung for {SECONDS} s" if hung else f"process ended: {os.waitstatus_to_exitcode(status)}"
                )
                worker.todo.remove(worker.current)
            place = workers.index(worker)
            workers.pop(place)
            if worker.todo and -1 not in findings:
                name = folder / f"worker_{worker.todo[0]}"
                workers.insert(place, start(materials, name, worker.todo, options))
    return findings


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000, help="mutations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first mutation")
    parser.add_argument("--only", help="a part of the name of a target, such as chat/tokenizer.json")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a process that has threads must not be forked
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        materials = Materials(Path(name) / "materials", forked)
        add_sources(materials)
        gc.freeze()
        findings = run(options, materials, Path(name))
    kinds = Counter()
    for number, found in sorted(findings.items()):
        rng = random.Random(f"{options.seed}/{number}")
        target = target_of(rng, options.only)
        kinds[kind := f"{target.source}/{target.file}: {found[:90]}"] += 1
        if kinds[kind] <= 2:
            only = f" --only {options.only}" if options.only else ""
            print(f"{target.source}/{target.file}: {found}\n  --seed {options.seed} --start {number} --count 1{only}")
    seconds = time.monotonic() - started
    print(
        f"{options.count} mutations in {seconds:.0f} s: {len(ACCEPTED)} accepted, {len(findings)} findings of "
        f"{len(kinds)} kinds, the others refused in one line"
    )
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
