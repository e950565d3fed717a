"""Runs the checks of this folder one after the other, each in a process of its own; see tests/gpu.sh. No torch here."""

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
SECONDS = {  # that each check should take on a GPU, imports included; it is ended after LIMIT times as many
    "machine": 40, "parity": 60, "precision": 50, "decoding": 85, "passes": 50, "optimizer": 40,
    "synchronisations": 25, "two_ranks": 50,
}  # fmt: skip
LIMIT = 1.6
KILL = 2.0  # seconds that ending a check may take
PACKAGES = ("torch", "transformers", "triton", "deepspeed")


def main() -> int:
    """Exit code 1 where a check has failed."""
    start, options = time.monotonic(), parse_options()
    out, rows = Path(options.out).absolute(), []
    out.mkdir(parents=True, exist_ok=True)
    lines, log = out / "gpu.jsonl", out / "gpu.log"
    lines.write_text(json.dumps(header(options)) + "\n", "utf-8")
    log.unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as folder:
        environment = environment_of(options, Path(folder))
        for name in options.only or SECONDS:
            left = start + 60 * options.minutes - time.monotonic() - KILL
            limit = left if options.cpu else min(left, LIMIT * SECONDS[name])
            row = {"check": name, "ok": False, "seconds": 0.0, "figures": {}, "error": "no time was left"}
            if limit > KILL:
                row |= run(name, Path(folder), log, options.cpu, environment, limit)
            with open(lines, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{name}: {'ok' if row['ok'] else row['error']} ({row['seconds']:.1f} s)", flush=True)
            rows.append(row)
    print_table(rows, time.monotonic() - start)
    return int(not all(row["ok"] for row in rows))


def run(name: str, folder: Path, log: Path, toy: bool, environment: dict[str, str], limit: float) -> dict:
    """Runs a check for at most `limit` seconds; returns what its line of gpu.jsonl has to say."""
    start, file, error = time.monotonic(), folder / f"{name}.jsonl", None
    file.touch()
    command = [sys.executable, "-m", "tests.gpu.report", name, str(file), str(limit), *["--toy"] * toy]
    with open(log, "ab", buffering=0) as output:
        output.write(f"===== {name}\n".encode())
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        if code := process.wait(limit):
            error = f"died with exit code {code}: see {log.name}"
    except subprocess.TimeoutExpired:
        error = f"ended after its limit of {limit:.0f} s"
        process.send_signal(signal.SIGUSR1)  # stacks into the log
        time.sleep(KILL / 2)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and all that it has started
        process.wait()
    figures = {}
    for line in file.read_text("utf-8").split("\n")[:-1]:  # behind the last line end: nothing, or what a kill cut off
        figures |= json.loads(line)
    error = figures.pop("error", error)
    return {"ok": error is None, "seconds": round(time.monotonic() - start, 1), "figures": figures, "error": error}


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bash tests/gpu.sh", description="Correctness and speed on a GPU.")
    parser.add_argument("--out", default="outputs/gpu", help="folder for gpu.jsonl and gpu.log")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything; what does not fit is left out")
    parser.add_argument("--wheels", help="folder of wheels to use besides what is installed (tests/gpu_wheels.sh)")
    parser.add_argument("--only", nargs="+", choices=SECONDS, metavar="NAME", help=" ".join(SECONDS))
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
        wheels = sorted(map(str, Path(options.wheels).glob("*.whl")))
        install = ["install", "-q", "--no-index", "--no-deps", "--no-compile", "--disable-pip-version-check"]
        subprocess.run([sys.executable, "-m", "pip", *install, "--target", paths[0], *wheels], check=True)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    programs = sysconfig.get_path("scripts")  # ninja, which builds CPU Adam, where this Python's are not on PATH
    environment["PATH"] = os.pathsep.join([programs, environment.get("PATH", os.defpath)])
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if options.cpu:  # TRITON_INTERPRET is read when triton is imported: its kernels run on the CPU
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
        environment["OMP_NUM_THREADS"] = "1"
    else:
        environment.pop("DS_ACCELERATOR", None)
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // 2)))
    return environment


def header(options: argparse.Namespace) -> dict:
    """The first line of gpu.jsonl: what is run, on what, when."""
    commit, versions = os.environ.get("COMMIT"), {}
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git here, or no repository
        command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    for wheel in Path(options.wheels or "/nowhere").glob("deepspeed-*.whl"):
        versions["deepspeed"] = wheel.name.split("-")[1]
    return {
        "card": "CPU" if options.cpu else card(), "versions": versions, "python": sys.version.split()[0],
        "commit": commit, "command": sys.argv[1:], "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def card() -> str | None:
    """Name, memory, driver and power limit of the first GPU by nvidia-smi; None without one."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version,power.limit", "--format=csv,noheader"]
    with contextlib.suppress(OSError):
        result = subprocess.run(query, capture_output=True, text=True, timeout=30)
        return result.stdout.splitlines()[0] if result.returncode == 0 and result.stdout else None


def print_table(rows: list[dict], seconds: float) -> None:
    """Prints check, outcome, seconds and figures. Lists and tables are in gpu.jsonl alone."""
    print(f"\n{'check':18}{'ok':>5}{'s':>8}  figures")
    for row in rows:
        figures = {key: x for key, x in row["figures"].items() if not isinstance(x, dict | list)}
        shown = (f"{key}={f'{x:.4g}' if isinstance(x, float) else x}" for key, x in figures.items())
        lines = textwrap.wrap(" ".join(shown), 90, break_long_words=False) or [""]
        lines += [f"error: {row['error']}"] if row["error"] else []
        print(f"{row['check']:18}{'yes' if row['ok'] else 'NO':>5}{row['seconds']:8.1f}  " + f"\n{'':33}".join(lines))
    print(f"{sum(row['ok'] for row in rows)} of {len(rows)} checks passed in {seconds:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
