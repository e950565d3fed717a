"""vLLM reaches no other machine: it reports no use, and asks neither a hub nor NVIDIA's server for kernels."""

import json
import subprocess
import sys

import pytest

from tests.helpers.tiny_run import REPOSITORY, clean_environment, run_flags
from tests.security.tiny_jobs import ATTEMPT


def watched(*words: str, **variables: str) -> subprocess.CompletedProcess:
    """Without the settings that keep Hugging Face's libraries offline."""
    environment = {key: value for key, value in clean_environment().items() if not key.startswith(("HF_", "VLLM_"))}
    command = [sys.executable, "-m", "tests.vllm.watched", *words]
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment | variables, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_a_run_reaches_no_other_machine(inputs, tmp_path):
    result = watched(*run_flags(inputs, tmp_path, rollout_engine="vllm"))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert json.loads(result.stdout.splitlines()[-1]) == {"reports": False, "downloads": False}
    assert (tmp_path / "final" / "model.safetensors").is_file()


@pytest.mark.slow
def test_asking_for_kernels_is_noticed():
    """A user's own server is asked."""
    result = watched(FLASHINFER_CUBINS_REPOSITORY="https://example.invalid/")
    assert result.returncode == ATTEMPT and "an attempt to reach example.invalid" in result.stderr
