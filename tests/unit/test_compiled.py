"""--compile: which passes run compiled layers, and that these say what the layers say."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import tests.helpers.varlen
from ppo.decoding.sampling import Sampling
from ppo.rollout import PolicySampler
from tests.helpers.parts import PROMPTS, GradientEngine, ppo_config, prompts_of, rollout_by_hand, tiny_policy, token_ids
from utils.models.compile import compile_layers, layers_of
from utils.models.load import enable_checkpointing


@pytest.fixture
def counter(monkeypatch):
    """Counts the graphs that are compiled, and leaves them as they are."""
    counter, compile = CompileCounterWithBackend("eager"), torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compile(*args, **kwargs, backend=counter))
    yield counter
    torch._dynamo.reset()


def gradient(policy, rows: slice) -> torch.Tensor:
    rollout = rollout_by_hand().rows(rows)
    policy.zero_grad()
    policy.train()(rollout.sequences, rollout.response_mask)[0].sum().backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


@pytest.mark.parametrize(("kernel", "checkpointing"), [("sdpa", False), ("varlen", True)])
def test_layers_share_their_graphs_whatever_the_lengths(counter, monkeypatch, checkpointing, kernel):
    if kernel == "varlen":
        tests.helpers.varlen.on_cpu(monkeypatch)
    two, six = tiny_policy(num_hidden_layers=2), tiny_policy(num_hidden_layers=6)
    for policy in (two, six):
        plain = copy.deepcopy(policy)
        if checkpointing:
            enable_checkpointing(policy.lm)
        compile_layers(policy)
        for rows in (slice(0, 4), slice(1, 3), slice(3, 4)):
            torch.testing.assert_close(gradient(policy, rows), gradient(plain, rows), atol=1e-5, rtol=1e-4)
        if policy is two:
            graphs = counter.frame_count
    assert 1 <= graphs == counter.frame_count


def test_decoding_and_copies_are_not_compiled(counter):
    policy = tiny_policy()

    def decoded() -> torch.Tensor:
        sampler = PolicySampler(GradientEngine(policy), token_ids(), ppo_config())
        return sampler(prompts_of(*PROMPTS), Sampling(), 1).sequences

    expected = decoded()
    compile_layers(policy)
    assert torch.equal(decoded(), expected) and counter.frame_count == 0
    policy(expected, expected > 0)
    assert counter.frame_count > 0
    assert len(layers_of(policy)) == 2 and all(layer._compiled_call_impl for layer in layers_of(policy))
    assert not any(layer._compiled_call_impl for layer in layers_of(copy.deepcopy(policy)))
