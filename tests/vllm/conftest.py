"""Tests with real vLLM. What they do runs in processes of its own (tests/vllm/jobs.py): vLLM changes its process."""

import importlib.util
import os

import pytest

from tests.helpers.tiny_run import Inputs, build_inputs


@pytest.fixture(scope="session", autouse=True)
def installed():
    """Skips all tests of this folder where vLLM is missing. In CI they fail."""
    if importlib.util.find_spec("vllm") is None:
        stop = pytest.fail if os.environ.get("CI") else pytest.skip
        stop("needs vLLM: source utils/setup.sh vllm")


@pytest.fixture(scope="session")
def inputs(installed, tmp_path_factory) -> Inputs:
    """As for other tiny runs, but with heads of 32, the smallest that vLLM has attention for on a CPU."""
    return build_inputs(tmp_path_factory.mktemp("inputs"), hidden_size=64)
