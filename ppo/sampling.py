"""From logits to a token: penalty, temperature, nucleus, and a random number that belongs to the response alone."""

from dataclasses import dataclass

import torch

NUCLEUS_GUESS = (
    512  # most likely tokens that nearly always hold the nucleus: sorting all would cost more than the model
)
GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)  # as signed 64-bit


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Temperature 1, top-p 1 and penalty 1 sample from the model itself."""

    temperature: float = 1.0
    topp: float = 1.0
    repetition_penalty: float = 1.0

    @property
    def caveat(self) -> str | None:
        """What to tell the user when log-probabilities at `temperature` are not those that were sampled from."""
        if self.topp == 1.0 and self.repetition_penalty == 1.0:
            return None
        return "sampling with --topp or --repetition_penalty: ratio and KL are those of the model without them"


# I §6.1: how answers are drawn to be judged
EVALUATION = Sampling(temperature=0.8, topp=0.9, repetition_penalty=1.1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014) on int64 with wrap-around."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64))):
        x = (x ^ _shift_right(x, shift)) * factor
    return x ^ _shift_right(x, 31)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def uniforms(seed: int, places: torch.Tensor, position: int) -> torch.Tensor:
    """Numbers in [0, 1) for one token of each response: a pure function of (seed, place, position).

    places: [batch] int64, a response's place in the run. No state, so neither batch, rank nor order matters.
    """
    key = _mix(torch.full_like(places, seed) + GOLDEN_GAMMA)
    key = _mix(key + places * GOLDEN_GAMMA)
    key = _mix(key ^ _mix(torch.full_like(places, position + 1) * GOLDEN_GAMMA))
    return _shift_right(key, 11).double() * 2.0**-53


def penalise_repetition(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Divides positive and multiplies negative logits of `seen` tokens by the penalty (Keskar et al. 2019, §4.1).

    logits, seen: [batch, vocabulary].
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_nucleus(probs: torch.Tensor, topp: float) -> torch.Tensor:
    """Keeps the fewest most likely tokens whose probability reaches topp, renormalised. [batch, vocabulary]."""
    ordered, index = probs.topk(min(NUCLEUS_GUESS, probs.shape[-1]))
    if bool((ordered.sum(-1) < topp).any()):
        ordered, index = probs.sort(dim=-1, descending=True)
    ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= topp, 0.0)
    kept = torch.zeros_like(probs).scatter(-1, index, ordered)
    return kept / kept.sum(-1, keepdim=True)


def sample(logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling, seen: torch.Tensor | None) -> torch.Tensor:
    """Inverts the cumulative distribution at `uniform`: one token a row. logits [batch, vocabulary], uniform [batch].

    seen: [batch, vocabulary] bool, needed with a repetition penalty. In float32, summed in float64: two batches whose
    logits agree to rounding draw the same tokens. Holds a few copies of one position's logits.
    """
    logits = logits.float()
    if sampling.repetition_penalty != 1.0:
        logits = penalise_repetition(logits, seen, sampling.repetition_penalty)
    probs = torch.softmax(logits / sampling.temperature, dim=-1)
    if sampling.topp < 1.0:
        probs = keep_nucleus(probs, sampling.topp)
    cumulative = probs.double().cumsum(-1)
    target = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
