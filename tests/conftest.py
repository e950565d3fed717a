"""For all tests: the markers `gpu` and `slow`, no GPU asked for where none is, no network; inputs of tiny runs."""

import os

import pytest
import torch

from utils.device import on_gpu

if not on_gpu():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: its kernels run on the CPU
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)  # for tiny tensors a second thread costs more than it gives


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Models, data and reward functions of tiny PPO runs (tests/helpers/tiny_run.py)."""
    from tests.helpers.tiny_run import build_inputs

    return build_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def single_process():
    """A process group of one. Afterwards the environment is as it was: later tests start commands of their own."""
    from utils.engine.engine import init_distributed, shutdown_distributed

    before = dict(os.environ)
    init_distributed()
    yield
    shutdown_distributed()
    os.environ.clear()
    os.environ.update(before)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the tests that are marked slow, too")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a GPU; skipped where there is none")
    config.addinivalue_line("markers", "slow: skipped unless --all is given")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not on_gpu():
            item.add_marker(pytest.mark.skip(reason="no GPU here"))
        if item.get_closest_marker("slow") and not config.getoption("--all"):
            item.add_marker(pytest.mark.skip(reason="slow: give --all"))
