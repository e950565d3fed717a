"""Runs the checks of this folder one after the other, each in a process of its own; see tests/gpu.sh.

The process of the next check starts early, so that its imports cost no time. No torch in here.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = {  # that each check should take on a GPU; it is ended after LIMIT times as many. 0: all that are left
    "machine": 35, "parity": 50, "precision": 40, "decoding": 75, "attention": 20, "frozen": 35, "passes": 40,
    "adapters": 30, "optimizer": 30, "against_trl": 100, "synchronisations": 15, "two_ranks": 40, "vllm": 110,
    "demo": 0,
}  # fmt: skip
LIMIT = 1.6
KILL = 2.0  # seconds that ending a check may take
PACKAGES = ("torch", "transformers", "triton", "deepspeed", "trl", "vllm")


class Check:
    """A check's process, which waits until `run` is called."""

    def __init__(self, name: str, folder: Path, toy: bool, environment: dict[str, str]):
        """folder: for its figures and its output."""
        self.name = name
        self.figures, self.log = folder / f"{name}.jsonl", folder / f"{name}.log"
        command = [sys.executable, "-m", "tests.gpu.child", name, str(self.figures), *["--toy"] * toy]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def run(self, limit: float, out: Path, demo: str | None) -> dict:
        """Runs the check for at most `limit` seconds; returns its line of gpu.jsonl."""
        start, error = time.monotonic(), None
        task = {"seconds": limit, "out": str(out), "demo": demo}
        with contextlib.suppress(BrokenPipeError):  # it has died while importing
            self.process.stdin.write(json.dumps(task).encode() + b"\n")
            self.process.stdin.flush()
        try:
            code = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            error = f"ended after its limit of {limit:.0f} s"
            self.process.send_signal(signal.SIGUSR1)  # stacks into the log
            time.sleep(KILL / 2)
        self.kill()
        figures = self._read()
        told = figures.pop("error", None)
        if error is None and code:
            error = told or f"died with exit code {code}: {self._last_words()}"
        seconds = round(time.monotonic() - start, 1)
        return {"check": self.name, "ok": error is None, "seconds": seconds, "figures": figures, "error": error}

    def kill(self) -> None:
        """Ends the process and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _read(self) -> dict:
        figures = {}
        for line in self.figures.read_text("utf-8").splitlines() if self.figures.exists() else ():
            with contextlib.suppress(json.JSONDecodeError):  # cut off by a kill
                figures |= json.loads(line)
        return figures

    def _last_words(self) -> str:
        lines = self.log.read_text("utf-8", "replace").strip().splitlines()
        return lines[-1][-300:] if lines else "no output"


def main() -> int:
    """Exit code 1 where a check has failed."""
    start = time.monotonic()
    options = parse_options()
    out = Path(options.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    for name in ("gpu.jsonl", "gpu.log"):
        (out / name).unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as folder:
        environment = environment_of(options, Path(folder))
        append(out / "gpu.jsonl", json.dumps(header(options)))
        rows = run_all(options, start, out, Path(folder), environment)
    print_table(rows, time.monotonic() - start)
    return int(not all(row["ok"] for row in rows))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bash tests/gpu.sh", description="Correctness and speed on a GPU.")
    parser.add_argument("--out", default="outputs/gpu", help="folder for gpu.jsonl, gpu.log and demo_metrics.jsonl")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything; what does not fit is left out")
    parser.add_argument("--wheels", help="folder of wheels to use besides what is installed (tests/gpu_wheels.sh)")
    parser.add_argument("--only", nargs="+", choices=SECONDS, metavar="NAME", help=" ".join(SECONDS))
    parser.add_argument("--demo", help="folder .demo/en as `bash run_en.sh --demo` makes it")
    parser.add_argument("--cpu", action="store_true", help="toy sizes on the CPU")
    options = parser.parse_args()
    if not (options.cpu or card()):
        parser.error("no GPU here (nvidia-smi names none); --cpu tries the checks at toy sizes")
    return options


def environment_of(options: argparse.Namespace, folder: Path) -> dict[str, str]:
    """The environment of every check's process."""
    environment = dict(os.environ)
    paths = [str(ROOT), environment.get("PYTHONPATH", "")]
    if options.wheels:
        paths.insert(0, str(folder / "wheels"))
        sys.path.insert(0, paths[0])
        wheels = sorted(map(str, Path(options.wheels).glob("*.whl")))
        install = ["install", "-q", "--no-index", "--no-deps", "--no-compile", "--disable-pip-version-check"]
        subprocess.run([sys.executable, "-m", "pip", *install, "--target", paths[0], *wheels], check=True)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    programs = sysconfig.get_path("scripts")  # ninja, which builds CPU Adam, where this Python's are not on PATH
    environment["PATH"] = os.pathsep.join([programs, environment.get("PATH", os.defpath)])
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if options.cpu:
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        environment["TRITON_INTERPRET"] = "1"  # read when triton is imported: its kernels run on the CPU
    else:
        environment.pop("DS_ACCELERATOR", None)
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // 2)))
    return environment


def run_all(options, start: float, out: Path, folder: Path, environment: dict[str, str]) -> list[dict]:
    """Runs all checks; returns their lines, each of which is written as soon as it is known."""
    names = [name for name in SECONDS if not options.only or name in options.only]
    demo = str(Path(options.demo).absolute()) if options.demo else None
    rows, started = [], []
    try:
        for i, name in enumerate(names):
            started += [Check(each, folder, options.cpu, environment) for each in names[len(started) : i + 2]]
            left = start + 60 * options.minutes - time.monotonic() - KILL
            limit = left if options.cpu or not SECONDS[name] else min(left, LIMIT * SECONDS[name])
            if limit > KILL:
                row = started[i].run(limit, out, demo)
            else:
                row = {"check": name, "ok": False, "seconds": 0.0, "figures": {}, "error": "no time was left"}
            append(out / "gpu.jsonl", json.dumps(row))
            text = started[i].log.read_text("utf-8", "replace")
            append(out / "gpu.log", f"===== {name}\n{text[-200_000:]}")
            print(f"{name}: {'ok' if row['ok'] else row['error']} ({row['seconds']:.1f} s)", flush=True)
            rows.append(row)
    finally:
        for check in started:
            check.kill()
    return rows


def append(file: Path, text: str) -> None:
    with open(file, "a", encoding="utf-8") as lines:
        lines.write(text + "\n")


def header(options: argparse.Namespace) -> dict:
    """The first line of gpu.jsonl: what was run, on what, when."""
    commit, versions = os.environ.get("COMMIT"), {}
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git here, or no repository
        command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "card": "CPU" if options.cpu else card(), "versions": versions, "python": sys.version.split()[0],
        "commit": commit, "command": sys.argv[1:],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def card() -> str | None:
    """Name, memory, driver and power limit of the first GPU by nvidia-smi; None without one."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version,power.limit", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except OSError:
        return None
    return result.stdout.splitlines()[0] if result.returncode == 0 and result.stdout else None


def print_table(rows: list[dict], seconds: float) -> None:
    """Prints check, outcome, seconds and figures. Lists and tables are in gpu.jsonl alone."""
    print(f"\n{'check':18}{'ok':>5}{'s':>8}  figures")
    for row in rows:
        shown = [f"{key}={_short(x)}" for key, x in row["figures"].items() if not isinstance(x, (dict, list))]
        lines = textwrap.wrap(" ".join(shown), 90, break_long_words=False) or [""]
        print(f"{row['check']:18}{'yes' if row['ok'] else 'NO':>5}{row['seconds']:8.1f}  {lines[0]}")
        for line in lines[1:]:
            print(f"{'':33}{line}")
        if row["error"]:
            print(f"{'':33}error: {row['error']}")
    print(f"{sum(row['ok'] for row in rows)} of {len(rows)} checks passed in {seconds:.0f} s")


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
