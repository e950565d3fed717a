"""Draws tokens from logits: repetition penalty, temperature, top-p, and a random stream per response."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

TOPK = 512  # most likely tokens, which nearly always contain the nucleus; a full sort costs more than a small model
BLOCK = 256  # tokens; about the square root of a vocabulary
GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)  # as signed 64-bit


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. With temperature, top-p and penalty 1, from the model's distribution."""

    temperature: float = 1.0
    topp: float = 1.0
    repetition_penalty: float = 1.0

    @property
    def from_model(self) -> bool:
        """Whether tokens are drawn from the model's distribution at `temperature`, without top-p and penalty."""
        return self.topp == 1.0 and self.repetition_penalty == 1.0


# Of answers that are evaluated (Part I §6.1).
EVALUATION = Sampling(temperature=0.8, topp=0.9, repetition_penalty=1.1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014) on int64 with wrap-around."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64))):
        x = (x ^ _shift_right(x, shift)) * factor
    return x ^ _shift_right(x, 31)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def uniforms(seed: int, places: torch.Tensor, position: int | torch.Tensor) -> torch.Tensor:
    """Returns float64 numbers in [0, 1), one per response token: a pure function of (seed, place, position).

    places: int64, a response's place in the run; position: of the token in the response, broadcast against `places`.
    There is no state, so the numbers do not depend on batch, rank or order.
    """
    key = _mix(torch.full_like(places, seed) + GOLDEN_GAMMA)
    key = _mix(key + places * GOLDEN_GAMMA)
    key = _mix(key ^ _mix((torch.zeros_like(places) + position + 1) * GOLDEN_GAMMA))
    return _shift_right(key, 11).double() * 2.0**-53


def penalise_repetition(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Divides positive and multiplies negative logits of `seen` tokens by the penalty (Keskar et al. 2019, §4.1).

    logits, seen: [batch, vocabulary]. `seen` is True for tokens of the response so far (Part I §6.1). Tokens of the
    prompt do not count: it contains the end token, and a penalty on that would keep responses from ending.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_nucleus(probs: torch.Tensor, topp: float) -> torch.Tensor:
    """Keeps the fewest most likely tokens whose probability reaches topp, renormalised. [batch, vocabulary]."""
    # On a GPU, the check whether TOPK tokens were enough would wait for the device.
    count = TOPK if probs.device.type == "cpu" else probs.shape[-1]
    ordered, index = probs.topk(min(count, probs.shape[-1]))
    if len(index[0]) < probs.shape[-1] and bool((ordered.sum(-1) < topp).any()):
        ordered, index = probs.sort(dim=-1, descending=True)
    ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= topp, 0.0)
    kept = torch.zeros_like(probs).scatter(-1, index, ordered)
    return kept / kept.sum(-1, keepdim=True)


def pick(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Inverts the cumulative distribution at `uniform`. probs [batch, vocabulary] float32, uniform [batch] -> [batch].

    Finds a block of tokens, then the token inside it: a float64 sum over the whole vocabulary costs as much as a small
    model.
    """
    missing = -probs.shape[-1] % BLOCK
    blocks = (F.pad(probs, (0, missing)) if missing else probs).unflatten(-1, (-1, BLOCK))  # F.pad copies in any case
    ends = blocks.sum(-1).double().cumsum(-1)
    target = uniform[:, None] * ends[:, -1:]
    block = _first_above(ends, target)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(-1)
    before = F.pad(ends, (1, 0)).gather(1, block)
    token = block * BLOCK + _first_above(inside, target - before)
    return token.squeeze(1).clamp(max=probs.shape[-1] - 1)


def _first_above(sums: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Returns the index of the first cumulative sum above `target`. [batch, n], [batch, 1] -> [batch, 1].

    Targets at or above the total count as just below it, so an entry of probability 0 is never chosen.
    """
    below_total = torch.nextafter(sums[:, -1:], torch.zeros_like(target))
    return torch.searchsorted(sums, torch.minimum(target, below_total), right=True).clamp(max=sums.shape[1] - 1)


def sample(logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling, seen: torch.Tensor | None) -> torch.Tensor:
    """Draws one token per row. logits [batch, vocabulary], uniform [batch] float64 in [0, 1) -> [batch].

    seen: [batch, vocabulary] bool, needed with a repetition penalty. Probabilities are float32, their sums over blocks
    float64, so that logits that agree to rounding give the same tokens.
    """
    if sampling.repetition_penalty != 1.0:
        logits = penalise_repetition(logits.float(), seen, sampling.repetition_penalty)
    if sampling.temperature != 1.0:
        logits = logits.float() / sampling.temperature
    probs = torch.softmax(logits, dim=-1, dtype=torch.float32)
    return pick(keep_nucleus(probs, sampling.topp) if sampling.topp < 1.0 else probs, uniform)
