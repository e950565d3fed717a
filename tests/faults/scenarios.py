"""Small runs that something befalls, one after the other, in processes forked from one that has imported the packages.

A case: "module" and "function", called with the words "argv" (main) or with these arguments (others); "ranks";
"fault": a name in FAULTS, or the arguments of kill_at; "patience": seconds; "log": file. "second": words
that the second rank gets in addition; "folders": the working folder of each rank.
"""

import atexit
import importlib
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    GIVEN = dict(os.environ)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

# Imports that take seconds, which every fork would pay otherwise.
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import matplotlib.backends.backend_svg
import matplotlib.figure  # noqa: F401
import torch
import torch.utils.tensorboard
from tqdm import tqdm

from tests.faults.faults import FAULTS, Fault, nothing
from tests.faults.moments import kill_at
from tests.helpers.tiny_run import REPOSITORY, Inputs, clean_environment, run_flags
from utils.launcher import free_port

LIMIT = 600  # seconds for a run to come to its end
DEFAULTS = {"module": "train_ppo", "function": "main", "ranks": 2, "fault": None, "patience": 60, "second": []}
SMALL = {"train_steps": 3, "checkpoint_per_step": 1, "keep_checkpoints": 3, "num_eval_prompts": 0}
_servers: dict[bool, subprocess.Popen] = {}  # with vLLM or without -> the process that others are forked from


@dataclass(frozen=True)
class Result:
    """What a case left. codes: of its ranks, negative for signals; log: of all of them; out: the run's folder."""

    codes: list[int]
    log: str
    out: Path


def run_cases(folder: Path, inputs: Inputs, cases: dict[str, dict], runs: Path | None = None) -> dict[str, Result]:
    """Name -> result of runs of train_ppo.py. A case: flags, and besides them what differs from DEFAULTS, and `out`.

    That is the run's folder in `runs`, if that is not in `folder` as the logs are.
    """
    rows = {}
    for name, case in cases.items():
        flags = dict(case)
        own = {key: flags.pop(key) for key in DEFAULTS if key in flags}
        out = (runs or folder) / flags.pop("out", name).replace(" ", "_")
        rows[name] = own | {"argv": run_flags(inputs, out, **SMALL | flags)}
    return run_forked(folder, rows)


def run_forked(folder: Path, rows: dict[str, dict]) -> dict[str, Result]:
    """Name -> result. A row: "argv", and what differs from DEFAULTS. Packages are imported once for all of them."""
    cases = [DEFAULTS | row | {"log": str(folder / f"{name}.log".replace(" ", "_"))} for name, row in rows.items()]
    with_vllm = any("vllm" in case["argv"] or case["module"].startswith("tests.vllm.") for case in cases)
    request = {"cases": cases, "log": str(folder / "scenarios.log"), "environment": clean_environment()}
    answer = _answer(with_vllm, request, LIMIT + 60 * len(cases))
    assert answer is not None, Path(request["log"]).read_text()[-3000:]
    found = {}
    for name, case, codes in zip(rows, cases, answer, strict=True):
        argv = case["argv"]
        out = Path(argv[argv.index("--model_save_path") + 1]) if case["function"] == "main" else folder
        found[name] = Result(codes, Path(case["log"]).read_text(), out)
    return found


def _answer(with_vllm: bool, request: dict, timeout: float) -> list[list[int]] | None:
    """Exit codes of the cases, from the process that is forked for them; None if it has failed."""
    if with_vllm not in _servers:
        command = [sys.executable, "-m", "tests.faults.scenarios", "vllm" if with_vllm else ""]
        environment = clean_environment() | {"DS_ACCELERATOR": "cpu"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        _servers[with_vllm] = server = subprocess.Popen(command, cwd=REPOSITORY, env=environment, **pipes)
        atexit.register(server.kill)
    server = _servers[with_vllm]
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    if not select.select([server.stdout], [], [], timeout)[0]:
        _servers.pop(with_vllm).kill()
        raise TimeoutError(f"no answer within {timeout} s; see {request['log']}")
    return json.loads(server.stdout.readline())


def finished(results: dict[str, Result]) -> dict[str, Path]:
    """Name -> folder. AssertionError unless all runs have come to their end on all ranks."""
    for name, result in results.items():
        assert not any(result.codes), f"{name}: {result.codes}: {result.log[-3000:]}"
    return {name: result.out for name, result in results.items()}


def start(run: Callable[[], None], ranks: int, log: Path, fault: Fault = nothing) -> list[int]:
    """Forks a process per rank, each of which calls `fault` with its rank and then `run`. Returns their ids."""
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
            tqdm.set_lock(threading.RLock())  # its own is shared by forked processes: who is killed would keep it
            torch.set_num_threads(1)  # makes the pool that a fork loses; two threads that do so at once fail
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


def wait(children: list[int], patience: float) -> list[int]:
    """Exit codes, negative for signals. `patience` seconds after one has ended badly the others are killed."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + LIMIT
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


def call(run: Callable, words: list, case: dict) -> None:
    """Calls the function of a case in the process of a rank."""
    rank = int(os.environ.get("RANK", "0"))
    os.chdir(case["folders"][rank] if "folders" in case else ".")
    run(*([words[0] + case["second"]] if rank == 1 and case["second"] else words))


def run(request: dict) -> list[list[int]]:
    """All cases, and what they print, in this process, which is forked for them."""
    own = {name: value for name, value in os.environ.items() if GIVEN.get(name) != value}  # that imports have set
    os.environ.clear()
    os.environ.update(request["environment"] | {"DS_ACCELERATOR": "cpu"} | own)
    handle = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    codes = []
    for case in request["cases"]:
        fault = case["fault"] or nothing
        fault = FAULTS[fault] if isinstance(fault, str) else kill_at(*fault) if isinstance(fault, list) else fault
        function = getattr(importlib.import_module(case["module"]), case["function"])
        words = [case["argv"]] if case["function"] == "main" else case["argv"]
        children = start(partial(call, function, words, case), case["ranks"], Path(case["log"]), fault)
        codes.append(wait(children, case["patience"]))
    return codes


def serve() -> None:
    """Answers each line of standard input, a request, with the codes of its cases, or null."""
    torch.set_num_threads(1)  # before the first tensor: a process that has threads must not be forked
    if "vllm" in sys.argv and importlib.util.find_spec("vllm"):
        importlib.import_module("ppo.decoding.vllm_engine")  # takes seconds, which every process would pay
    for line in sys.stdin:
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            found = None
            try:
                found = run(json.loads(line))
            except BaseException:  # noqa: BLE001 - this process must not go on as the parent
                traceback.print_exc()
            finally:
                os.write(writer, json.dumps(found).encode())
                os._exit(0)
        os.close(writer)
        with open(reader) as answer:
            print(answer.read() or "null", flush=True)
        os.waitpid(child, 0)


if __name__ == "__main__":
    serve()
