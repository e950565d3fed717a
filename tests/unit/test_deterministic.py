"""--deterministic: on during a run and off after it, the same numbers, and names of nondeterministic operations."""

import os

import pytest
import torch

from tests.helpers.parts import ppo_config
from tests.helpers.tiny import tiny_llama
from tests.helpers.tiny_run import read_metrics, run_flags
from train_ppo import main
from utils.deterministic import repeatable, strictly
from utils.engine.engine import TrainEngine
from utils.errors import UserError

REWARD = """
import os
import torch

def put(prompts, answers):
    torch.zeros(3).put_(torch.tensor([1]), torch.ones(1))  # one of the few without a deterministic kernel on a CPU
    print(os.environ.get("CUBLAS_WORKSPACE_CONFIG"), os.environ.get("FLASH_ATTENTION_DETERMINISTIC"))
    return [float(len(answer)) for answer in answers]
"""


def state() -> tuple:
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    return torch.are_deterministic_algorithms_enabled(), warn_only, torch.backends.cudnn.deterministic, filled


def put() -> None:
    """As in REWARD."""
    torch.zeros(3).put_(torch.tensor([1]), torch.ones(1))


def test_a_run_has_it_on_and_the_same_numbers(inputs, tmp_path, capfd):
    before, environment = state(), dict(os.environ)
    (tmp_path / "reward.py").write_text(REWARD)
    for wanted, said in ((True, ":4096:8 1\n"), (False, "None None\n")):
        flags = {"reward_fn": f"{tmp_path}/reward.py:put", "deterministic": wanted, "train_steps": 1}
        main(run_flags(inputs, tmp_path / str(wanted), **flags))
        assert state() == before
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        out = capfd.readouterr().out
        assert said in out and out.count("--deterministic: put_ has no deterministic kernel") == wanted  # named once
    assert read_metrics(tmp_path / "True") == read_metrics(tmp_path / "False")


class Model(torch.nn.Module):
    """The sum of squares of a language model's logits. broken: with such an operation in its backward pass alone."""

    def __init__(self, broken: bool):
        super().__init__()
        self.lm, self.broken = tiny_llama(), broken

    def forward(self, ids):
        logits = self.lm(ids).logits
        if self.broken:
            logits.register_hook(lambda gradient: put())
        return logits.square().sum()


def test_a_backward_pass_is_strict_and_says_what_it_cannot_repeat(single_process):
    """Flash attention uses its deterministic kernel in strict mode only, contrary to PyTorch's documentation."""
    ids, seen = torch.tensor([[1, 5, 7, 9]]), []
    engine = TrainEngine(Model(broken=False), ppo_config(zero_stage=2), "model")
    next(engine.module.parameters()).register_hook(lambda gradient: seen.append(state()[:2]))
    engine.backward(engine(ids))
    with repeatable(True):
        engine.backward(engine(ids))
        assert state()[:2] == (True, True)
        broken = TrainEngine(Model(broken=True), ppo_config(zero_stage=2), "model")
        with pytest.raises(UserError, match="--deterministic: put_, in the backward pass"):
            broken.backward(broken(ids))
        assert state()[:2] == (True, True)
    assert seen == [(False, False), (True, False)]


@pytest.mark.gpu
def test_gradients_of_attention_repeat(single_process):
    """Two backward passes over the same long rows are equal bit for bit."""
    options = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    inputs = [torch.randn(2, 8, 2048, 64, **options) for _ in range(3)]

    def gradients() -> list[torch.Tensor]:
        output = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)
        with strictly():
            return torch.autograd.grad(output.float().square().sum(), inputs)

    with repeatable(True):
        first = gradients()
        for _ in range(5):
            assert all(map(torch.equal, gradients(), first))
