"""The corpus of broken inputs: every command names the flag and the place, exits with code 2 and changes nothing.

A YAML file has one case per line: {command, files, flags, error}. `files` are written to the folder of the case, as
text or JSON. `flags` change those of tests/bad_inputs/commands.py; null leaves a flag out. `error` holds the parts,
separated by " … ", that the one line on standard error must contain. A case with `says` instead succeeds and prints
these parts. {names} are of tests/bad_inputs/materials.py; {folder} is the folder of the case.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.bad_inputs.commands import COMMANDS
from tests.bad_inputs.materials import BUILDERS, Materials
from tests.helpers.tiny_run import REPOSITORY, as_argv, clean_environment
from utils.engine.engine import init_distributed

CASES = {
    f"{table.stem}: {name}": {"command": table.stem} | case
    for table in sorted(Path(__file__).parent.glob("*.yaml"))
    for name, case in yaml.safe_load(table.read_text("utf-8")).items()
}
IN_A_PROCESS = ["ppo: broken JSON", "merge: another command"]


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Materials:
    init_distributed()  # DeepSpeed prints when it is first used
    return Materials(tmp_path_factory.mktemp("materials"))


def filled(value, materials: Materials, folder: Path):
    """The value with every {name} in its texts replaced by a path."""
    if isinstance(value, list):
        return [filled(item, materials, folder) for item in value]
    if not isinstance(value, str):
        return value

    def path(match: re.Match) -> str:
        name = match[1]
        return str(folder if name == "folder" else materials[name] if name in BUILDERS | materials else match[0])

    return re.sub(r"\{(\w+)\}", path, value)


def write_files(files: dict, folder: Path) -> None:
    """Text as it stands (half of a surrogate pair is a byte), lists as JSON, a value per line for .jsonl."""
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, str):
            content = "".join(json.dumps(x) + "\n" for x in content) if name.endswith("l") else json.dumps(content)
        file.write_bytes(content.encode("utf-8", "surrogateescape"))


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def command_line(case: dict, materials: Materials, folder: Path) -> list[str]:
    """The words after the command."""
    command = COMMANDS[case["command"]]
    flags = {k: filled(v, materials, folder) for k, v in (command.flags | case.get("flags", {})).items()}
    return case.get("words", command.words) + as_argv(flags)


@pytest.fixture
def prepared(request, materials, tmp_path):
    """(command, its words, the parts of its message, what the case's folder holds before)."""
    case = CASES[request.param]
    write_files(case.get("files", {}), tmp_path)
    parts = filled(case.get("error") or case["says"], materials, tmp_path).split(" … ")
    argv = command_line(case, materials, tmp_path)
    return COMMANDS[case["command"]], argv, parts, contents(tmp_path)


def check_error(shown: str, parts: list[str]) -> None:
    """One line, the last one, which holds all parts."""
    line = re.search(r"(?:^|[\r\n])error: ([^\n]*)\n\Z", shown)[1]
    assert [part for part in parts if part not in line] == [], line


@pytest.mark.parametrize("prepared", [name for name, case in CASES.items() if "error" in case], indirect=True)
def test_is_refused(prepared, tmp_path, capfd):
    command, argv, parts, before = prepared
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        command.main(argv)
    shown = capfd.readouterr().err
    check_error(shown, parts)
    assert shown.startswith("error: ") or command.module in (
        "reward.score",
        "ppo.chat",
    )  # which print all they say there
    assert stopped.value.code == 2
    assert contents(tmp_path) == before


@pytest.mark.parametrize("prepared", [name for name, case in CASES.items() if "says" in case], indirect=True)
def test_goes_on_and_says_what_it_left_out(prepared, capfd):
    command, argv, parts, _ = prepared
    capfd.readouterr()
    command.main(argv)
    shown = "".join(capfd.readouterr())
    assert [part for part in parts if part not in shown] == []


@pytest.mark.parametrize("prepared", IN_A_PROCESS, indirect=True)
def test_a_process_ends_with_its_code_and_no_traceback(prepared):
    command, argv, parts, _ = prepared
    words = [sys.executable, "-m", command.module, *argv]
    result = subprocess.run(words, cwd=REPOSITORY, env=clean_environment(), capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr + result.stdout
    check_error(result.stderr, parts)


def test_there_are_enough_of_them():
    assert len(CASES) >= 380
