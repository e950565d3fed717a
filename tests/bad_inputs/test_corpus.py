"""The corpus of broken inputs: every case in the tables beside this file, with the exact line that the user sees.

A table is a YAML file, case -> {command, files, flags, error}: `files` are written to the case's own folder (text, or
what becomes JSON), `flags` change those of tests/bad_inputs/commands.py (a value, a list, null to leave one out), and
`error` is all that the command may say on standard error, after "error: ", before it ends with exit code 2. A case with
`says` instead goes on, and every such line is said. {names} are of tests/bad_inputs/materials.py; {folder} is the
case's own.
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

TABLES = sorted(Path(__file__).parent.glob("*.yaml"))
CASES = {
    f"{table.stem}: {name}": {"command": table.stem} | case
    for table in TABLES
    for name, case in yaml.safe_load(table.read_text("utf-8")).items()
}
IN_A_PROCESS = [
    "ppo: no such flag", "ppo: broken JSON", "ppo: pickle that would run code", "merge: another command",
    "score: no such file",
]  # fmt: skip


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Materials:
    init_distributed()  # DeepSpeed speaks when it is first used
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
    """Text as it stands (half of a surrogate pair is a byte), lists as JSON, a value a line for .jsonl."""
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, str):
            content = "".join(json.dumps(x) + "\n" for x in content) if name.endswith("l") else json.dumps(content)
        file.write_bytes(content.encode("utf-8", "surrogateescape"))


def command_line(case: dict, materials: Materials, folder: Path) -> list[str]:
    """The words after the command."""
    command = COMMANDS[case["command"]]
    flags = command.flags | case.get("flags", {})
    return case.get("words", command.words) + as_argv({k: filled(v, materials, folder) for k, v in flags.items()})


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def of(kind: str) -> list[str]:
    return [name for name, case in CASES.items() if kind in case]


@pytest.fixture
def prepared(request, materials, tmp_path):
    """(case, its command line, what its folder holds before)."""
    case = CASES[request.param]
    write_files(case.get("files", {}), tmp_path)
    return case, command_line(case, materials, tmp_path), contents(tmp_path)


@pytest.mark.parametrize("prepared", of("error"), indirect=True)
def test_is_refused_with_its_line(prepared, materials, tmp_path, capfd):
    case, argv, before = prepared
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        COMMANDS[case["command"]].main(argv)
    shown = capfd.readouterr().err
    if case["command"] == "score":  # says everything on standard error, and the error last
        shown = shown[shown.rindex("error: ") :]
    assert shown == f"error: {filled(case['error'], materials, tmp_path)}\n"
    assert stopped.value.code == 2
    assert contents(tmp_path) == before


@pytest.mark.parametrize("prepared", of("says"), indirect=True)
def test_goes_on_and_says_what_it_left_out(prepared, materials, tmp_path, capfd):
    case, argv, _ = prepared
    capfd.readouterr()
    COMMANDS[case["command"]].main(argv)
    shown = "".join(capfd.readouterr()).splitlines()
    for line in case["says"]:
        assert filled(line, materials, tmp_path) in shown


@pytest.mark.parametrize("prepared", IN_A_PROCESS, indirect=True)
def test_a_process_ends_with_its_code_and_no_traceback(prepared, materials, tmp_path):
    case, argv, before = prepared
    command = [sys.executable, "-m", COMMANDS[case["command"]].module, *argv]
    result = subprocess.run(command, cwd=REPOSITORY, env=clean_environment(), capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == f"error: {filled(case['error'], materials, tmp_path)}"
    assert "Traceback" not in result.stderr + result.stdout
    assert contents(tmp_path) == before


def test_there_are_enough_of_them():
    assert len(CASES) >= 120
