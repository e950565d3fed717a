"""The corpus of hostile inputs: each is refused in one line and changes nothing, or accepted for a reason.

No case may take more than 20 s or 2 GB, run code, or send control characters to the terminal.
"""

import json

import pytest

from tests.helpers.tiny_run import run_module
from tests.hostile.case import Case, problem
from tests.hostile.corpus import CASES
from tests.hostile.shells import SHELLS, run_shell

LIMIT = 2 << 30  # bytes


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory) -> dict[str, dict]:
    """How the chosen cases end, all run in one process and its forks, which share what is slow."""
    folder = tmp_path_factory.mktemp("hostile")
    items = [item for item in request.session.items if not item.get_closest_marker("skip")]
    chosen = [item.callspec.params["name"] for item in items if "outcomes" in item.fixturenames]
    (folder / "names.json").write_text(json.dumps(chosen))
    result = run_module("tests.hostile.run", folder, folder / "names.json", timeout=1200)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((folder / "outcomes.json").read_text())


# The short form of the tests runs every eighth case.
SOME = [name if i % 8 == 0 else pytest.param(name, marks=pytest.mark.slow) for i, name in enumerate(CASES)]


@pytest.mark.parametrize("name", SOME)
def test_hostile(name, outcomes):
    assert problem(CASES[name], outcomes[name], LIMIT) is None


@pytest.mark.parametrize("name", SHELLS)
def test_hostile_recipe(name, tmp_path):
    assert run_shell(SHELLS[name], tmp_path) is None


def test_there_are_500_of_them():
    assert len(CASES) + len(SHELLS) >= 500


GOOD = {"code": 2, "log": "error: --a /x is wrong\n", "bytes": 0, "changed": [], "argv": ["--a", "/x"], "seconds": 0}


@pytest.mark.parametrize(
    "change",
    [
        {"code": "hung"}, {"code": 1}, {"code": -9}, {"code": 0}, {"log": "Traceback\nerror: --a\n"}, {"bytes": LIMIT
        + 1},
        {"log": "error: --a: can't allocate memory\n"}, {"changed": ["ran"]}, {"changed": ["out/config.json"]},
        {"log": "error: \x1b[2J--a\n"}, {"log": "error: --a\u202e\n"}, {"log": "error: --a\nmore\n"},
        {"log": "wrong\n"},
        {"log": "error: wrong\n"}, {"log": "error: --a\nerror: --a\n"},
    ],
)  # fmt: skip
def test_what_counts_as_a_failure(change):
    """The check itself: one thing wrong in an outcome that is right otherwise."""
    case = Case("sft", "policy", str)
    assert problem(case, GOOD, LIMIT) is None
    assert problem(case, GOOD | change, LIMIT) is not None
