"""sft/loss.py and utils/models/chunked_logprobs.py: by hand, and against a plain cross entropy over all logits."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sft.loss import answer_loss
from utils.models.chunked_logprobs import head_logits, sum_nll


def case(batch: int = 3, length: int = 7, width: int = 8, vocab: int = 11):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch, length, width, generator=generator)
    sequences = torch.randint(0, vocab, (batch, length), generator=generator)
    mask = torch.rand(batch, length, generator=generator) < 0.5
    mask[:, 0] = False
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = nn.Linear(width, vocab, bias=False)
    return hidden, sequences, mask, head


@pytest.mark.parametrize("chunk", [1, 4, 100], ids=["made again", "kept", "one"])
def test_chunks_give_the_loss_and_gradient_of_a_plain_cross_entropy(chunk):
    hidden, sequences, mask, head = case()
    assert 4 < mask.sum() <= 16
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    (3 * sum_nll(ours, sequences, mask, head, chunk=chunk)).backward()
    our_weight_grad, head.weight.grad = head.weight.grad, None
    targets = torch.where(mask, sequences, -100)[:, 1:]
    expected = F.cross_entropy(head(theirs)[:, :-1].flatten(0, 1), targets.flatten(), reduction="sum")
    (3 * expected).backward()
    assert sum_nll(hidden, sequences, mask, head, chunk=chunk).item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(our_weight_grad, head.weight.grad)


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_a_head_that_ranks_share_is_called_equally_often(tokens):
    """Under ZeRO-3, ranks with different numbers of calls would deadlock: up to 2500 tokens are always three chunks."""
    hidden, sequences, _, head = case(batch=1, length=8)
    mask = (torch.arange(8) >= 8 - tokens)[None]
    calls = []
    head.register_forward_hook(lambda *_: calls.append(1))
    alone = answer_loss(hidden, sequences, mask, head)
    assert len(calls) == 1
    torch.testing.assert_close(answer_loss(hidden, sequences, mask, head, even_tokens=2500), alone)
    assert len(calls) == 1 + 3
    assert alone.item() > 0 or not tokens
    assert sum_nll(hidden.bfloat16(), sequences, mask, head.bfloat16()).dtype == torch.float32


def test_soft_capped_logits_stay_within_the_cap():
    logits = partial(head_logits, nn.Identity(), SimpleNamespace(final_logit_softcapping=30.0))
    assert logits(torch.tensor([30.0])).item() == pytest.approx(30 * math.tanh(1.0), rel=1e-6)
