"""What has to be quick: help and wrong flags, before anything heavy is imported."""

import json
import subprocess
import sys

import pytest

from tests.helpers.tiny_run import REPOSITORY, clean_environment

PROBE = """
import json, runpy, sys
module, *flags = sys.argv[1:]
sys.argv = [module, *flags]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
except SystemExit as end:
    print(json.dumps([end.code, sorted({name.split(".")[0] for name in sys.modules})]))
"""
MODULES = [
    "train_ppo",
    "sft.train",
    "reward.train",
    "reward.evaluate",
    "reward.strength",
    "reward.score",
    "ppo.compare",
]


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(("flag", "code"), [("--help", 0), ("--dtpye", 2)])
def test_help_and_wrong_flags_import_nothing_heavy(module, flag, code):
    """Imports of torch, transformers and deepspeed take seconds; numpy and pandas alone would be felt too."""
    result = subprocess.run(
        [sys.executable, "-c", PROBE, module, flag], cwd=REPOSITORY, env=clean_environment(), capture_output=True,
        text=True,
    )  # fmt: skip
    first, last = (result.stdout.splitlines()[place] for place in (0, -1))
    found_code, modules = json.loads(last)
    assert found_code == code
    assert not {"torch", "transformers", "deepspeed", "numpy", "datasets"} & set(modules)
    if code:
        assert result.stderr == "error: --dtpye is unknown; did you mean --dtype? (see --help)\n"
    else:
        assert first.startswith(f"usage: python -m {module} ")
