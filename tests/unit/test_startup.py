"""What has to be quick: help and wrong flags, before anything heavy is imported."""

import json
import subprocess
import sys

import pytest

from tests.helpers.tiny_run import REPOSITORY, clean_environment

PROBE = """
import json, runpy, sys
sys.argv = ["train_ppo.py", *sys.argv[1:]]
try:
    runpy.run_path("train_ppo.py", run_name="__main__")
except SystemExit as end:
    print(json.dumps([end.code, sorted({name.split(".")[0] for name in sys.modules})]))
"""


@pytest.mark.parametrize(("flags", "code"), [(["--help"], 0), (["--kl_penalty_wieght", "1"], 2)])
def test_help_and_wrong_flags_import_nothing_heavy(flags, code):
    """Imports of torch, transformers and deepspeed take ten seconds; numpy and pandas alone would be felt too."""
    command = [sys.executable, "-c", PROBE, *flags]
    result = subprocess.run(command, cwd=REPOSITORY, env=clean_environment(), capture_output=True, text=True)
    found_code, modules = json.loads(result.stdout.splitlines()[-1])
    assert found_code == code and "ppo" in modules
    assert not {"torch", "transformers", "deepspeed", "numpy", "datasets"} & set(modules)
