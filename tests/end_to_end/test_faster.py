"""Flags that make a step faster leave its numbers where they were."""

import pytest
import torch

import ppo.score
from tests.helpers.tiny_run import read_metrics, run_flags
from train_ppo import main
from utils.engine.state import same_weights


@pytest.fixture(scope="module")
def run_with(inputs, tmp_path_factory):
    """The metrics of a run with these flags, an evaluation a step included; the critic alone learns in the first."""

    def run(**changes) -> list[dict]:
        out = tmp_path_factory.mktemp("run") / "new"
        main(run_flags(inputs, out, critic_pretrain_steps=1, **changes))
        return read_metrics(out)

    return run


@pytest.fixture(scope="module")
def plain(run_with):
    return run_with()


def test_one_pass_for_policy_and_reference(run_with, plain, monkeypatch):
    """While they are the same: in the critic's own step, its evaluation, and the first of the policy's."""
    asked = []

    def never(policy, reference):
        asked.append(same_weights(policy, reference))
        return False

    monkeypatch.setattr(ppo.score, "same_weights", never)
    assert run_with() == plain
    assert asked == [True, True, True, False, False, False]  # a step and its evaluation, three times


def test_the_samplers_own_logprobs(run_with, plain):
    rows = run_with(reuse_sampler_logprobs=True)
    for row, expected in zip(rows, plain, strict=True):
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert rows != plain


def test_compiled_layers(run_with, plain):
    """In float32, with recomputation in the backward pass; all layers are one graph, however many there are."""
    torch._dynamo.reset()
    rows = run_with(compile=True, gradient_checkpoint=True)
    for row, expected in zip(rows, plain, strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert rows != plain
