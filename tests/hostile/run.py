"""Runs cases of the corpus, each in a process forked from this one:   python -m tests.hostile.run FOLDER [NAMES.json]

Writes FOLDER/outcomes.json: name -> how it ended. Everything slow is imported, and made, once for all of them.
"""

import contextlib
import gc
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - takes seconds, which every engine in a fork would pay
import torch

import ppo.report
from tests.bad_inputs.commands import COMMANDS as PLAIN
from tests.bad_inputs.commands import Command
from tests.helpers.tiny_run import as_argv
from tests.hostile.case import Case, contents
from tests.hostile.corpus import CASES
from tests.hostile.materials import Materials

SECONDS, BYTES = 20, 2 << 30  # of a case
ROOM = 8 << 30  # of addresses beyond those of this process, so that a mistake does not fill the machine
HUNG = "hung"
COMMANDS = PLAIN | {"report": Command(ppo.report.main, "ppo.report", {}, ["{model}"])}


def filled(value, names: dict[str, str]):
    """The value with paths for the names in braces."""
    if isinstance(value, list):
        return [filled(item, names) for item in value]
    if isinstance(value, str):
        for name, path in names.items():
            value = value.replace(f"{{{name}}}", path)
    return value


def limit_memory() -> None:
    """Keeps this process from more addresses than it has now, and ROOM."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def forked(main, argv: list[str], log: Path, place: Path) -> dict:
    """Calls main(argv) in a process of its own, in `place`. Returns {"code" (or "hung"), "seconds", "bytes", "log"}."""
    started = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    child = os.fork()
    if not child:
        code = 1
        try:
            os.setpgid(0, 0)
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            limit_memory()
            os.chdir(place)
            main(argv)
            code = 0
        except SystemExit as stopped:
            code = stopped.code or 0
        except BaseException:  # noqa: BLE001 - whatever it is, this process must not go on as the parent
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    code = None
    while code is None:
        done, status, used = os.wait4(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
        elif time.monotonic() - started > SECONDS:
            os.kill(child, signal.SIGKILL)
            _, _, used = os.wait4(child, 0)
            code = HUNG
        else:
            time.sleep(0.003)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it has started and left
    peak = 1024 * (used.ru_maxrss - before)
    return {
        "code": code,
        "seconds": time.monotonic() - started,
        "bytes": peak,
        "log": log.read_bytes().decode(errors="replace"),
    }


def run(case: Case, materials: Materials, folder: Path) -> dict:
    """How a case ends, and what it has changed in its folder."""
    folder.mkdir(parents=True)
    model = folder / "model"
    if case.source:
        shutil.copytree(materials[case.source], model)
    else:
        model.mkdir()
    case.change(model)
    command, names = COMMANDS[case.command], materials.paths | {"folder": str(folder), "model": str(model)}
    argv = filled(command.words, names) + as_argv(
        {k: filled(v, names) for k, v in (command.flags | case.flags).items()}
    )
    before = contents(folder)
    outcome = forked(command.main, argv, folder.with_suffix(".log"), folder)
    after = contents(folder)
    changed = sorted(name for name in before | after if before.get(name, 0) != after.get(name, 0))
    shutil.rmtree(folder)
    return outcome | {"changed": changed, "argv": argv}


def main(folder: Path, names: list[str]) -> None:
    """All cases with these names, in two processes."""
    torch.set_num_threads(1)  # before the first tensor: a process that has threads must not be forked
    materials = Materials(folder / "materials", forked)
    gc.freeze()  # or each fork would copy what its garbage collection looks at
    parts = []
    for k in range(2):
        part, child = folder / f"part_{k}.json", os.fork()
        parts.append((child, part))
        if not child:
            try:
                found = {name: run(CASES[name], materials, folder / f"{k}_{i}") for i, name in enumerate(names[k::2])}
                part.write_text(json.dumps(found))
                os._exit(0)
            finally:
                traceback.print_exc()
                os._exit(1)
    outcomes = {}
    for child, part in parts:
        os.waitpid(child, 0)
        outcomes |= json.loads(part.read_text())
    (folder / "outcomes.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    chosen = json.loads(Path(sys.argv[2]).read_text()) if sys.argv[2:] else list(CASES)
    main(Path(sys.argv[1]), chosen)
