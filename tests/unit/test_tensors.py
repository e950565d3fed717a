"""Masked tensor functions, by hand."""

import math

import pytest
import torch

from utils.tensors import (
    at_tokens,
    before_tokens,
    last_index,
    masked_mean,
    position_ids,
    shift_to_next,
    token_logprobs,
    whiten,
)

NAN = float("nan")


def test_masked_mean_reads_the_mask_only():
    mask = torch.tensor([[True, False], [True, True]])
    assert masked_mean(torch.tensor([[1.0, NAN], [2.0, 6.0]]), mask).item() == 3.0
    assert masked_mean(torch.tensor([NAN]), torch.tensor([False])).item() == 0.0


def test_whiten_by_hand():
    # 1, 3, 5: mean 3, population variance 8/3
    mask = torch.tensor([[True, False, True], [False, True, False]])
    whitened = whiten(torch.tensor([[1.0, NAN, 3.0], [9.0, 5.0, 9.0]]), mask)
    step = 2 / math.sqrt(8 / 3)
    torch.testing.assert_close(whitened, torch.tensor([[-step, 0.0, 0.0], [0.0, step, 0.0]]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("x", [[[4.0, 0.0]], [[4.0, 4.0]]])
def test_whiten_one_token_or_equal_ones_gives_zero(x):
    x = torch.tensor(x)
    assert whiten(x, x > 0).tolist() == [[0.0, 0.0]]
    assert whiten(x, torch.zeros_like(x).bool()).tolist() == [[0.0, 0.0]]


def test_whiten_over_two_ranks_equals_one_batch():
    mine, other = torch.tensor([[1.0, 2.0]]), torch.tensor([[7.0, -3.0]])
    both = torch.cat([mine, other])
    mean = both.mean()
    answers = iter([torch.stack([both.sum(), torch.tensor(4.0)]), (both - mean).square().sum()])
    whitened = whiten(mine, torch.ones(1, 2).bool(), sum_ranks=lambda x: next(answers))
    torch.testing.assert_close(whitened, whiten(both, torch.ones(2, 2).bool())[:1])


def test_token_logprobs_shifts_by_one_and_is_float32():
    # Before token 1 the logits say log 1, log 3; before token 2 they are equal. The last row is not read.
    logits = torch.tensor([[[0.0, math.log(3)], [5.0, 5.0], [NAN, NAN]]]).bfloat16()
    logprobs = token_logprobs(logits, torch.tensor([[1, 1, 0]]))
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, torch.tensor([[0.0, math.log(0.75), math.log(0.5)]]), atol=2e-3, rtol=0)


def test_before_and_at_tokens_are_each_others_places():
    mask = torch.tensor([[False, False, True, True], [False, True, False, False]])
    states = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]])
    rows = before_tokens(states, mask)
    assert rows.tolist() == [11, 12, 20]
    assert at_tokens(rows, mask).tolist() == [[0, 0, 11, 12], [0, 20, 0, 0]]
    nothing = torch.zeros_like(mask)
    assert at_tokens(before_tokens(states, nothing), nothing).tolist() == [[0] * 4] * 2


def test_shift_to_next():
    assert shift_to_next(torch.tensor([[1.0, 2.0, 3.0]])).tolist() == [[0.0, 1.0, 2.0]]


def test_position_ids_with_padding_anywhere():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 1, 1]]).bool()
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2], [0, 0, 0, 1, 2]]


def test_last_index():
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]).bool()
    assert last_index(mask).tolist() == [2, 0, 3, 0]
