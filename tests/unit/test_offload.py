"""Optimizer states in host memory during a rollout: their storages are empty then, and nothing changes afterwards."""

import pytest
import torch

from ppo.models import PolicyModel
from tests.helpers.parts import ppo_config
from tests.helpers.tiny import tiny_llama
from utils.engine.engine import DTYPES, TrainEngine
from utils.engine.offload import step_tensors
from utils.memory.zero_bytes import optimizer_bytes

CASES = [(0, "fp32", "bf16"), (1, "bf16", "bf16"), (2, "fp32", "bf16"), (2, "bf16", "fp32"), (3, "bf16", "bf16")]
IDS = torch.arange(3, 35).view(2, 16)
ANSWER = (torch.arange(16) > 5).expand(2, -1)


def engine_of(stage: int, dtype: str, accum: str) -> TrainEngine:
    module = PolicyModel(tiny_llama(1000, hidden_size=128).to(DTYPES[dtype]))
    return TrainEngine(module, ppo_config(zero_stage=stage, dtype=dtype, grad_accum_dtype=accum), "policy")


def step(engine: TrainEngine) -> None:
    engine.module.train()
    engine.backward(engine(IDS, ANSWER)[0].sum())
    engine.measure()
    engine.apply(1e-3)


@torch.no_grad()
def logprobs(engine: TrainEngine) -> torch.Tensor:
    return engine(IDS, ANSWER)[0]


def contents(engine: TrainEngine) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in engine.state_tensors().items()} | engine.full_state_dict()


@pytest.mark.parametrize(("stage", "dtype", "accum"), CASES)
def test_nothing_changes_and_the_device_holds_none_of_it_meanwhile(single_process, stage, dtype, accum):
    ours, plain, calls = engine_of(stage, dtype, accum), engine_of(stage, dtype, accum), []
    ours.before_change = lambda: calls.append("waited")
    for _ in range(2):  # before Adam has moments, and with them
        calls.clear()
        with ours.states_offloaded():
            assert calls == ["waited"]
            states = step_tensors(ours.engine.optimizer, stage, ours.module.parameters())
            assert sum(x.untyped_storage().nbytes() for x in states) == 0
            assert torch.equal(logprobs(ours), logprobs(plain))
            assert ours.full_state_dict().keys() == plain.full_state_dict().keys()  # what vLLM gets can be gathered
        step(ours)
        step(plain)
        found, wanted = contents(ours), contents(plain)
        assert found.keys() == wanted.keys()
        assert [name for name, x in wanted.items() if not torch.equal(x, found[name])] == []
    states = sum(x.nbytes for x in step_tensors(ours.engine.optimizer, stage, ours.module.parameters()))
    if stage == 3:
        states -= ours.engine.optimizer.grad_partitions_flat_buffer.nbytes
    assert states == optimizer_bytes([p.numel() for p in tiny_llama(1000, hidden_size=128).parameters()], stage, 1)


def test_after_an_error_the_state_is_back(single_process):
    engine = engine_of(2, "bf16", "bf16")
    step(engine)
    before = contents(engine)
    with pytest.raises(ZeroDivisionError), engine.states_offloaded():
        1 / 0  # noqa: B018
    assert all(torch.equal(x, before[name]) for name, x in contents(engine).items())
