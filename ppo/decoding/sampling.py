"""From logits to a token: penalty, temperature, nucleus, and a random number that belongs to the response alone."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

NUCLEUS_GUESS = (
    512  # most likely tokens that nearly always hold the nucleus: sorting all would cost more than the model
)
BLOCK = 256  # tokens; about the root of a vocabulary
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


def uniforms(seed: int, places: torch.Tensor, position: int | torch.Tensor) -> torch.Tensor:
    """Numbers in [0, 1), one a response token: a pure function of (seed, place, position).

    places: int64, a response's place in the run; position: of the token in the response, broadcast against `places`.
    No state, so neither batch, rank nor order matters.
    """
    key = _mix(torch.full_like(places, seed) + GOLDEN_GAMMA)
    key = _mix(key + places * GOLDEN_GAMMA)
    key = _mix(key ^ _mix((torch.zeros_like(places) + position + 1) * GOLDEN_GAMMA))
    return _shift_right(key, 11).double() * 2.0**-53


def penalise_repetition(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Divides positive and multiplies negative logits of `seen` tokens by the penalty (Keskar et al. 2019, §4.1).

    logits, seen: [batch, vocabulary]. `seen` marks the tokens of the response so far, as in I §6.1: the turns of a
    prompt all hold the end token, and a penalty on it would keep responses from ending.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_nucleus(probs: torch.Tensor, topp: float) -> torch.Tensor:
    """Keeps the fewest most likely tokens whose probability reaches topp, renormalised. [batch, vocabulary]."""
    guess = (
        NUCLEUS_GUESS if probs.device.type == "cpu" else probs.shape[-1]
    )  # a GPU would be waited for to see if it did
    ordered, index = probs.topk(min(guess, probs.shape[-1]))
    if len(index[0]) < probs.shape[-1] and bool((ordered.sum(-1) < topp).any()):
        ordered, index = probs.sort(dim=-1, descending=True)
    ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= topp, 0.0)
    kept = torch.zeros_like(probs).scatter(-1, index, ordered)
    return kept / kept.sum(-1, keepdim=True)


def pick(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Inverts the cumulative distribution at `uniform`. probs [batch, vocabulary] float32, uniform [batch] -> [batch].

    In two steps, as running sums in float64 over a whole vocabulary cost as much as a small model: first a block of
    tokens by the blocks' sums, then a token inside.
    """
    blocks = F.pad(probs, (0, -probs.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    ends = blocks.sum(-1).double().cumsum(-1)
    target = uniform[:, None] * ends[:, -1:]
    block = _first_above(ends, target)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(-1)
    before = F.pad(ends, (1, 0)).gather(1, block)
    token = block * BLOCK + _first_above(inside, target - before)
    return token.squeeze(1).clamp(max=probs.shape[-1] - 1)


def _first_above(sums: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Index of the first running sum above `target`, taken as below their total: what adds nothing is never found.

    [batch, n], [batch, 1] -> [batch, 1]. In a row of NaN the last.
    """
    below_total = torch.nextafter(sums[:, -1:], torch.zeros_like(target))
    return torch.searchsorted(sums, torch.minimum(target, below_total), right=True).clamp(max=sums.shape[1] - 1)


def sample(logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling, seen: torch.Tensor | None) -> torch.Tensor:
    """One token a row, drawn at `uniform`. logits [batch, vocabulary], uniform [batch] float64 in [0, 1).

    seen: [batch, vocabulary] bool, needed with a repetition penalty. Probabilities are float32 and summed in float64
    from blocks on: two batches whose logits agree to rounding draw the same tokens. Holds a few copies of one
    position's logits.
    """
    if sampling.repetition_penalty != 1.0:
        logits = penalise_repetition(logits.float(), seen, sampling.repetition_penalty)
    if sampling.temperature != 1.0:
        logits = logits.float() / sampling.temperature
    probs = torch.softmax(logits, dim=-1, dtype=torch.float32)
    return pick(keep_nucleus(probs, sampling.topp) if sampling.topp < 1.0 else probs, uniform)
