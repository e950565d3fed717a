"""--grad_accum_dtype on two ranks, which exchange gradients in bf16: the float32 sum is the closer one by far."""

import subprocess
import sys

from safetensors.torch import load_file

from tests.helpers.accumulation import CASES, error
from tests.helpers.tiny_run import REPOSITORY, clean_environment


def test_two_ranks_add_up_in_float32(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "tests.helpers.accumulation", str(tmp_path)],
        cwd=REPOSITORY, env=clean_environment() | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    errors = {}
    for case in CASES:
        files = sorted((tmp_path / case).glob("*.safetensors"))
        assert len(files) == 2
        errors[case] = error({key: x for file in files for key, x in load_file(file).items()})
    for stage in (2, 3):
        assert errors[f"{stage}-fp32"] < 0.25 * errors[f"{stage}-bf16"], errors
