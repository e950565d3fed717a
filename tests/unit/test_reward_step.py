"""A training step of the reward model: ranked answers, and the contrastive loss over micro-batches."""

import copy
import random
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from data.batching.collate import pad
from data.batching.micro_batch_plan import rank_plan
from reward.batches import Comparison
from reward.config import RewardConfig
from reward.contrastive import cache_gradients, contrastive_loss_sum, pair_features
from reward.forward import best_answer_mask, forward_answers, score_comparisons
from reward.loss import simcse_losses
from reward.model import last_scores, set_dropout
from reward.stage import comparison_counts, comparison_sums
from tests.helpers.parts import VOCAB_SIZE, tiny_scalar_model
from utils.engine.engine import InferenceEngine

ENGINE = InferenceEngine(tiny_scalar_model())


def config(**changes) -> RewardConfig:
    paths = {"hf_model_name_or_path": "M", "data_path": "D", "model_save_path": "O"}
    return RewardConfig(**paths | {"dtype": "fp32", "zero_stage": 0} | changes)


def comparisons() -> list[Comparison]:
    """A pair, a ranked list of three with margins, a pair; answers of several lengths."""
    pair = Comparison([[1, 5, 6, 7, 2], [1, 5, 8, 2]], 2, [(0, 1)], [0.0], "a", "x:1")
    ranked = Comparison([[1, 9, 2], [1, 9, 4, 4, 2], [1, 9, 3, 2]], 2, [(2, 0), (2, 1), (0, 1)], [1, 2, 3], "a", "x:2")
    return [pair, ranked, replace(pair, pairs=[(1, 0)], source="x:3")]


def score(ids: list[int]) -> torch.Tensor:
    x = torch.tensor([ids])
    mask = torch.ones_like(x, dtype=torch.bool)
    return last_scores(ENGINE(x, mask), mask)[0]


def test_the_loss_of_a_ranked_list_is_the_mean_over_its_pairs():
    items = comparisons()[:2]
    rows = []

    def engine(ids, *args, **kwargs):
        rows.append(len(ids))
        return ENGINE(ids, *args, **kwargs)

    sums = comparison_sums(engine, items, config(label_smoothing=0.2))
    assert rows == [2 + 3]  # each answer once
    a, b, (r, s, t) = score(items[0].answers[0]), score(items[0].answers[1]), map(score, items[1].answers)

    def loss(difference: torch.Tensor) -> torch.Tensor:
        return 0.8 * F.softplus(-difference) + 0.2 * F.softplus(difference)

    expected = loss(a - b) + (loss(t - r - 1) + loss(t - s - 2) + loss(r - s - 3)) / 3
    torch.testing.assert_close(sums["ranking_loss"], expected)
    torch.testing.assert_close(sums["score_difference"], a - b + (t - r + t - s + r - s) / 3)
    assert comparison_counts(items, config())["ranking_loss"] == 2


def test_the_language_model_loss_is_on_the_best_answers_tokens():
    items = comparisons()
    _, mask = pad([answer for item in items for answer in item.answers], 0)
    expected = torch.zeros(7, 5)
    expected[0, 2:5] = expected[4, 2:4] = expected[6, 2:4] = 1  # first of the pair, last of the list, second
    assert torch.equal(best_answer_mask(items, mask), expected.bool())
    assert comparison_counts(items, config(reward_lm_loss_factor=1.0))["lm_loss"] == 3 + 2 + 2


def with_lm_head() -> InferenceEngine:
    model = copy.deepcopy(ENGINE.module)
    model.lm_head = torch.nn.Linear(32, VOCAB_SIZE, bias=False)
    return InferenceEngine(model)


def test_the_second_view_has_no_language_model_loss():
    engine, items = with_lm_head(), comparisons()
    once, twice = (forward_answers(engine, items, True, seed).nll for seed in (None, 1))
    torch.testing.assert_close(twice, once)


@pytest.mark.parametrize("max_tokens", [1000, 16, 1])
def test_held_out_scores_do_not_depend_on_the_batches(max_tokens):
    items = comparisons()
    plan = partial(rank_plan, max_tokens=max_tokens, num_ranks=1, rank=0)
    scored, nll = score_comparisons(ENGINE, items, plan)
    expected = torch.stack([score(ids) for item in items for ids in item.answers])
    torch.testing.assert_close(scored.scores, expected)
    assert nll == 0.0


def test_a_dummy_forward_pass_changes_nothing():
    items, model = comparisons(), with_lm_head()
    alone, nll = score_comparisons(model, items, lambda _: [([1, 2], 1.0)], with_lm=True)
    kept, nll_kept = score_comparisons(model, items, lambda _: [([1, 2], 1.0), ([0], 0.0)], with_lm=True)
    assert torch.equal(kept.scores, alone.scores) and nll_kept == nll > 0
    assert kept.scores[:2].tolist() == [0, 0] and kept.scores[2:].all()
    engine = trained_part(0.3)
    cached = (
        cache_gradients(engine, items, lambda _, parts=parts: parts, length, 1.0, random.Random(0))
        for parts in ([([1, 2], 1.0)], [([1, 2], 1.0), ([0], 0.0)])
    )
    for one, other in zip(*cached, strict=True):
        assert torch.equal(one.cached_gradient.losses, other.cached_gradient.losses)


def trained_part(dropout: float) -> InferenceEngine:
    """A model of its own in training mode, in which this share of attention weights is dropped."""
    model = copy.deepcopy(ENGINE.module).train()
    set_dropout(model, dropout)
    return InferenceEngine(model)


def gradients(engine: InferenceEngine) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in engine.module.backbone.parameters()])


def length(item: Comparison) -> int:
    return 2 * item.padded_tokens


@pytest.mark.parametrize(("dropout", "max_tokens"), [(0.3, 10_000), (1e-9, 10_000), (1e-9, 20)])
def test_the_contrastive_gradient_is_that_of_one_graph_over_all_pairs(dropout, max_tokens):
    """In one batch under the same dropout; and, almost without dropout, however the batch is cut."""
    items, engine = comparisons(), trained_part(dropout)
    plan = partial(rank_plan, max_tokens=max_tokens, num_ranks=1, rank=0)
    seed = random.Random("s").getrandbits(32)
    members = [items[i] for i in (plan([length(item) for item in items])[0][0] if max_tokens > 20 else range(3))]
    features = pair_features(forward_answers(engine, members, dropout_seed=seed).states, members)
    expected = simcse_losses(features[:, 0], features[:, 1], 0.5).sum()
    expected.backward()
    whole = gradients(engine)
    engine.module.zero_grad()

    cached = cache_gradients(engine, items, plan, length, 0.5, random.Random("s"))
    parts = plan([length(item) for item in items])
    assert len(parts) == (1 if max_tokens > 20 else 3)
    total = 0.0
    for part, _ in parts:
        sums = comparison_sums(engine, [cached[i] for i in part], config(simcse_coef=1.0))
        sums["simcse_loss"].backward()
        total += sums["simcse_loss"].item()
    assert total == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradients(engine), whole, rtol=1e-4, atol=1e-6)
    assert whole.abs().max() > 1e-3


def test_the_two_views_differ_by_dropout_and_repeat_with_their_seed():
    state = torch.get_rng_state()
    engine, items = trained_part(0.3), comparisons()
    first, again, other = (forward_answers(engine, items, dropout_seed=seed).states for seed in (1, 1, 2))
    assert first.shape == (2, 7, 32)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (first[0] - first[1]).abs().max() > 1e-3
    scores = forward_answers(trained_part(1e-9), items, dropout_seed=3).scores
    torch.testing.assert_close(scores, forward_answers(ENGINE, items).scores)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_item_keeps_its_place_in_the_sum():
    """With a cached gradient of ones, the gradient of each feature is 1 and the value is the sum of the losses."""
    items = cache_gradients(ENGINE, comparisons(), lambda lengths: [([0, 1, 2], 1.0)], length, 1.0, random.Random(0))
    states = torch.randn(2, 7, 32, requires_grad=True)
    ones = [
        replace(i, cached_gradient=replace(i.cached_gradient, gradient=torch.ones_like(i.cached_gradient.gradient)))
        for i in items[1:2]
    ]
    value = contrastive_loss_sum(states[:, 2:5], ones)
    value.backward()
    torch.testing.assert_close(value, items[1].cached_gradient.losses.sum())
    # Answer 2 of the list is better twice; answer 0 once better, once worse; answer 1 worse twice.
    assert states.grad[:, 2:5].amax(dim=(0, 2)).tolist() == [0, -2, 2]
