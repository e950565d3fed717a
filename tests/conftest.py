"""For all tests: the marker `gpu`, no GPU asked for where there is none, no network, inputs of tiny PPO runs."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)  # for tiny tensors a second thread costs more than it gives


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Models, data and reward functions of tiny PPO runs (tests/tiny_run.py)."""
    from tests.tiny_run import build_inputs

    return build_inputs(tmp_path_factory.mktemp("inputs"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a GPU; skipped where there is none")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU here"))
