"""Cases of the recipes: values of variables that are no numbers, and paths with all that a path may hold."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.tiny_run import REPOSITORY

SCRIPTS = ("run_en.sh", "run_zh.sh", "sft/run.sh", "reward/run.sh")
STARTED = "started"  # the file of the command lines of what a recipe starts


@dataclass(frozen=True)
class Shell:
    """A recipe with variables. passed: a word that the recipe must hand on as it is; "" if it has to refuse."""

    script: str
    variables: dict[str, str]
    passed: str = ""


CODE = {
    "an index": "x[$(touch ran)]",
    "an index of an array": "PATH[$(touch ran)0]",
    "a command": "$(touch ran)",
    "backquotes": "`touch ran`",
    "two commands": "1;touch ran",
}
NUMBERS = CODE | {"negative": "-1", "a half": "1.5", "a word": "two", "a float": "1e3", "a space": " ",
    "beyond 64 bits": "9" * 20, "two numbers": "1 2",
                  "two lines": "1\n2", "a name": "HOME", "a sum": "1+1", "an escape": "\x1b[2J",
                  "a flag": "--help"}  # fmt: skip
SOME = CODE | {title: NUMBERS[title] for title in ("negative", "a word", "two numbers", "an escape")}
PATHS = {"a space": "a b", "a line break": "a\nb", "a glob": "*", "quotes": "a'b\"c", "a command": "$(touch ran)",
    "backquotes": "`touch ran`", "an escape": "\x1b[2J",
         "a semicolon": "a;touch ran", "a backslash": "a\\b", "a dollar": "$HOME", "a brace": "{a,b}",
         "a leading dash": "-x"}  # fmt: skip
SHELLS = (
    {f"NUM_GPUS: {title} ({script})": Shell(script, {"NUM_GPUS": value}) for title, value in CODE.items()
    for script in SCRIPTS}
    | {f"NUM_GPUS: {title}": Shell("sft/run.sh", {"NUM_GPUS": value}) for title, value in NUMBERS.items()
    if title not in CODE}
    | {f"OMP_NUM_THREADS: {title}": Shell("sft/run.sh", {"OMP_NUM_THREADS": value}) for title, value in SOME.items()}
    | {f"MASTER_PORT: {title}": Shell("sft/run.sh", {"MASTER_PORT": value, "NUM_GPUS": "1", "HOSTFILE": "hosts"})
    for title, value in SOME.items()}
    | {f"HOSTFILE: {title}": Shell("sft/run.sh", {"HOSTFILE": value, "NUM_GPUS": "1"}) for title,
    value in PATHS.items()}
    | {f"OUTPUT: {title}": Shell("sft/run.sh", {"OUTPUT": f"{{folder}}/{value}"}, f"{{folder}}/{value}") for title,
    value in PATHS.items()}
    | {f"MODEL: {title}": Shell("reward/run.sh", {"MODEL": value}, value) for title, value in PATHS.items()}
)  # fmt: skip


def run_shell(case: Shell, folder: Path) -> str | None:
    """What is wrong with the way in which a recipe ends, or None. What it would start only notes its command line."""
    tools, log = folder / "bin", folder / STARTED
    tools.mkdir()
    for name in ("python", "deepspeed"):
        (tools / name).write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" >> {log}\n')
        (tools / name).chmod(0o755)
    (folder / "hosts").write_text("localhost slots=1\n")
    before = set(folder.rglob("*"))
    plain = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "VIRTUAL_ENV": "active",
        "NUM_GPUS": "0",
        "OUTPUT": str(folder / "out"),
        "HOME": str(folder),
    }
    plain |= dict.fromkeys(("POLICY_MODEL", "REWARD_MODEL", "CRITIC_MODEL", "DATA"), str(folder))
    given = {
        k: str(folder / v) if v == "hosts" else v.replace("{folder}", str(folder)) for k, v in case.variables.items()
    }
    result = subprocess.run(
        ["bash", REPOSITORY / case.script], cwd=folder, env=os.environ | plain | given, capture_output=True,
        timeout=20, text=True, errors="replace",
    )  # fmt: skip
    started = log.read_text().split("\0") if log.exists() else []
    for place in (folder, REPOSITORY):
        if (place / "ran").exists():
            (place / "ran").unlink()
            return "code ran"
    if case.passed:
        passed = case.passed.replace("{folder}", str(folder))
        fine = result.returncode == 0 and (passed in started or f"./{passed}" in started)  # else -x would be a flag
        return None if fine else f"{result.returncode}: {started} {result.stderr}"
    lines = result.stderr.strip().splitlines()
    name = next(iter(case.variables))
    fine = (
        result.returncode == 2
        and len(lines) == 1
        and lines[0].startswith("error: ")
        and name in lines[0]
        and "\x1b" not in result.stderr
    )
    made = sorted(path.name for path in set(folder.rglob("*")) - before)
    return None if fine and not made else f"{result.returncode}: {result.stderr[-400:]!r}, made {made}"
