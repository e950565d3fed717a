"""From logits to tokens: the random numbers, nucleus and penalty by hand, and the distribution that comes out."""

import math

import pytest
import torch

from ppo.decoding.sampling import EVALUATION, Sampling, keep_nucleus, penalise_repetition, sample, uniforms
from tests.helpers.parts import ppo_config

PLAIN = Sampling()
MANY = torch.arange(40_000)


def chi_square(tokens: torch.Tensor, probs: torch.Tensor) -> float:
    """Σ (seen - expected)² / expected over tokens of probability above 0."""
    seen, expected = torch.bincount(tokens, minlength=len(probs)).double(), probs.double() * len(tokens)
    possible = expected > 0
    return float(((seen - expected).square()[possible] / expected[possible]).sum())


def draw(logits: torch.Tensor, sampling: Sampling = PLAIN) -> torch.Tensor:
    return sample(logits.expand(len(MANY), -1), uniforms(3, MANY, 0), sampling, None)


def test_uniforms_are_in_range_and_even():
    numbers = uniforms(1, MANY, 5)
    assert numbers.dtype == torch.float64
    assert 0.0 <= float(numbers.min()) < float(numbers.max()) < 1.0
    # Ten equal bins: chi-square with 9 degrees of freedom exceeds 27.9 once in a thousand.
    assert chi_square((numbers * 10).long(), torch.full((10,), 0.1)) < 27.9


def test_uniforms_never_repeat_over_places_positions_and_seeds():
    numbers = [uniforms(seed, MANY[:2000], position) for seed in (0, 1, 42) for position in range(8)]
    everything = torch.cat(numbers)
    assert len(everything.unique()) == len(everything)


@pytest.mark.parametrize("shift", ["place", "position", "seed"])
def test_neighbouring_streams_are_uncorrelated(shift):
    first = uniforms(7, MANY, 3)
    other = {"place": uniforms(7, MANY + 1, 3), "position": uniforms(7, MANY, 4), "seed": uniforms(8, MANY, 3)}[shift]
    correlation = float(torch.corrcoef(torch.stack([first, other]))[0, 1])
    assert abs(correlation) < 4 / math.sqrt(len(MANY))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_are_the_softmax(temperature):
    logits = torch.tensor([[2.0, -1.0, 0.0, 1.0, float("-inf"), -3.0]])
    tokens = draw(logits, Sampling(temperature=temperature))
    weights = [math.exp(x / temperature) for x in logits[0].tolist()]
    probs = torch.tensor([w / sum(weights) for w in weights])
    assert chi_square(tokens, probs) < 18.5  # four degrees of freedom, p = 0.001
    assert not (tokens == 4).any()


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2.0**-53])
def test_a_token_of_probability_zero_is_never_drawn(uniform):
    # At both ends and in the middle, where an inverted sum would slip onto its neighbour.
    minus = float("-inf")
    logits = torch.tensor([[minus, 0.0, minus, 0.0, minus]])
    token = sample(logits, torch.tensor([uniform], dtype=torch.float64), PLAIN, None)
    assert token.item() == (1 if uniform < 0.5 else 3)


@pytest.mark.parametrize(
    ("topp", "expected"),
    [
        (0.4, [0.0, 1.0, 0.0, 0.0]),
        (0.6, [0.0, 0.5 / 0.8, 0.3 / 0.8, 0.0]),  # 0.5 does not reach it, so the next comes too
        (0.85, [0.15 / 0.95, 0.5 / 0.95, 0.3 / 0.95, 0.0]),
        (1.0, [0.15, 0.5, 0.3, 0.05]),
        (1e-6, [0.0, 1.0, 0.0, 0.0]),  # the likeliest always stays
    ],
)
def test_nucleus_by_hand(topp, expected):
    kept = keep_nucleus(torch.tensor([[0.15, 0.5, 0.3, 0.05]]), topp)
    torch.testing.assert_close(kept, torch.tensor([expected]))


def test_a_large_vocabulary_is_inverted_as_by_running_sums():
    """Over many blocks, an incomplete one at the end, against sums over all of it in float64."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5000, generator=generator)
    logits[torch.rand(5000, generator=generator) < 0.5] = float("-inf")
    tokens = draw(logits[None])
    sums = torch.softmax(logits, -1).double().cumsum(-1)
    expected = torch.searchsorted(sums, uniforms(3, MANY, 0) * sums[-1], right=True)
    assert (tokens != expected).sum() <= 2  # where a number falls within rounding of a border
    assert torch.isfinite(logits[tokens]).all()


def test_repetition_penalty_by_hand():
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0, 0.0]])
    seen = torch.tensor([[True, True, False, False, True]])
    assert penalise_repetition(logits, seen, 4.0).tolist() == [[0.5, -8.0, 2.0, -2.0, 0.0]]


def test_defaults_are_plain_and_evaluation_is_the_papers():
    flags = ppo_config()
    assert Sampling(flags.temperature, flags.topp, flags.repetition_penalty) == PLAIN == Sampling(1.0, 1.0, 1.0)
    assert Sampling(temperature=0.5).from_model
    assert (EVALUATION.topp, EVALUATION.temperature, EVALUATION.repetition_penalty) == (0.9, 0.8, 1.1)
    assert not any(sampling.from_model for sampling in (Sampling(topp=0.9), Sampling(repetition_penalty=1.1)))
