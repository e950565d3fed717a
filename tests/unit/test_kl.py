"""KL estimators: numbers worked by hand, and what they estimate."""

import math

import pytest
import torch

from ppo.kl import KL_ESTIMATORS

LOGPROBS = torch.tensor([-1.0, -1.0, -1.0])
REF_LOGPROBS = torch.tensor([0.0, -15.0, -30.0])


@pytest.mark.parametrize(
    ("name", "expected"),
    [("k1", [-1.0, 14.0, 29.0]), ("k2", [0.5, 98.0, 420.5]), ("k3", [math.e - 2, 13.0, 28.0])],
)
def test_worked_numbers(name, expected):
    torch.testing.assert_close(KL_ESTIMATORS[name](LOGPROBS, REF_LOGPROBS), torch.tensor(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_equal_models_have_none(name):
    assert KL_ESTIMATORS[name](REF_LOGPROBS, REF_LOGPROBS).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_unbiased_under_the_policy(name):
    policy, reference = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    exact = sum(p * math.log(p / q) for p, q in zip(policy.tolist(), reference.tolist()))
    expected = (policy * KL_ESTIMATORS[name](policy.log(), reference.log())).sum()
    assert float(expected) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("name", ["k2", "k3"])
def test_gradient_of_the_loss_form_points_to_the_reference(name):
    # d k2 / d log π = log π - log π_ref;  d k3 / d log π = 1 - exp(log π_ref - log π)
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    reference = torch.tensor([-2.0, -1.0])
    KL_ESTIMATORS[name](logprobs, reference).sum().backward()
    expected = {"k2": [1.0, -1.0], "k3": [1 - math.exp(-1), 1 - math.e]}[name]
    torch.testing.assert_close(logprobs.grad, torch.tensor(expected))


def test_k3_keeps_small_differences():
    # exp(d) - 1 loses d = 1e-4 to rounding; d²/2 is the answer to first order.
    assert float(KL_ESTIMATORS["k3"](torch.tensor(-1e-4), torch.tensor(0.0))) == pytest.approx(5e-9, rel=2e-3)
