"""Steps of SFT and of the reward model: loss and gradient do not depend on how a batch is cut into forwards and ranks.

Also the reward model's own terms: ranked answers, and the contrastive loss over micro-batches.
"""

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import tests.helpers.varlen
from data.batching.collate import pad
from data.batching.micro_batch_plan import rank_plan
from data.dialogues import EncodedDialogue
from reward.batches import Comparison
from reward.config import RewardConfig
from reward.contrastive import cache_gradients, pair_features
from reward.forward import best_answer_mask, forward_answers, score_comparisons
from reward.loss import simcse_losses
from reward.model import ScalarHead, ScalarModel, last_scores, new_head_weight, set_dropout
from reward.stage import build_stage as reward_stage
from reward.stage import comparison_counts, comparison_sums
from sft.config import SFTConfig
from sft.model import AnswerModel
from sft.packed_batches import Layout
from sft.stage import build_stage as sft_stage
from tests.helpers.parts import VOCAB_SIZE, GradientEngine, tiny_scalar_model
from tests.helpers.tiny import tiny_llama
from utils.engine.engine import InferenceEngine
from utils.run.supervised_loop import Stage, train_step

VOCAB = 60
LENGTHS = [23, 5, 12, 3, 9, 2, 17, 8, 4, 30, 6, 11]
FLAGS = {"hf_model_name_or_path": "M", "model_save_path": "O", "dtype": "fp32", "zero_stage": 0}
CUTS = [(1, 1), (40, 1), (64, 2), (1, 3), (10_000, 3)]  # (tokens of a forward, ranks)
ENGINE = InferenceEngine(tiny_scalar_model())


class KeptEngine(GradientEngine):
    """Keeps the gradient instead of making the step."""

    def apply(self, lr: float) -> None:
        self.kept = self.gradients()


def random_ids(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def over_ranks(
    engine: KeptEngine, stage: Stage, items: list, max_tokens: int, ranks: int
) -> tuple[float, torch.Tensor]:
    """(loss, gradient), each summed over the ranks' shares."""
    loss, gradient = 0.0, 0.0
    for rank in range(ranks):
        share = replace(stage, plan=partial(rank_plan, max_tokens=max_tokens, num_ranks=ranks, rank=rank))
        loss += train_step(engine, share, items, 1.0)["loss"]
        gradient += engine.kept
    return loss, gradient


def check(
    engine: KeptEngine, stage: Stage, rows_for: Callable[[int], list], expected: tuple[float, torch.Tensor]
) -> None:
    for max_tokens, ranks in CUTS:
        loss, gradient = over_ranks(engine, stage, rows_for(ranks), max_tokens, ranks)
        assert loss == pytest.approx(expected[0], rel=1e-5), (max_tokens, ranks)
        assert (gradient - expected[1]).norm() < 1e-5 * expected[1].norm(), (max_tokens, ranks)


@pytest.mark.parametrize("how", ["padded", "packed", "joined"])
def test_a_step_of_sft(monkeypatch, how):
    items = [
        EncodedDialogue(ids, [t > 0 and (t % 7 in (2, 3) or t >= len(ids) - 2) for t in range(len(ids))])
        for ids in random_ids(LENGTHS)
    ]
    lm = tiny_llama(VOCAB)
    config, layout = (
        SFTConfig(data_path=["D"], micro_batch_tokens=64, **FLAGS),
        Layout(how == "packed", False, 64, how == "joined"),
    )
    model = AnswerModel(lm)
    engine, stage = KeptEngine(model), sft_stage(config, model, None, layout, iter([items]), [])
    plain = Layout(False, flat=False, max_tokens=64)
    expected = over_ranks(engine, replace(stage, sums=partial(stage.sums, layout=plain)), plain.rows(items, 1), 9999, 1)
    if how == "joined":
        tests.helpers.varlen.on_cpu(monkeypatch)
    check(engine, stage, lambda ranks: layout.rows(items, ranks), expected)


@pytest.mark.parametrize("joined", [False, True])
def test_a_step_of_the_reward_model(monkeypatch, joined):
    """Pairs, a ranked list, margins, smoothing, and the language-model loss, which has another denominator."""
    ids = random_ids([length + 2 for length in LENGTHS])
    pairs = [Comparison([a, b], 1, [(0, 1)], [0.5], "all", "x") for a, b in zip(ids[:8:2], ids[1:8:2], strict=True)]
    ranked = Comparison(ids[8:11], 1, [(2, 0), (2, 1), (0, 1)], [0.0, -1.0, 2.0], "all", "x")
    items = [*pairs[:2], ranked, *pairs[2:]]
    lm, head = tiny_llama(VOCAB), ScalarHead(64, 1, bias=False)
    head.weight.data.copy_(new_head_weight(64, 0))
    model = ScalarModel(lm.model, head, lm.lm_head)
    config = RewardConfig(data_path="D", label_smoothing=0.1, reward_lm_loss_factor=0.7, **FLAGS)
    engine, stage = KeptEngine(model), reward_stage(config, model, None, iter([items]), None)
    expected = over_ranks(engine, stage, items, 10_000, 1)
    if joined:
        tests.helpers.varlen.on_cpu(monkeypatch)
        stage = reward_stage(config, model, None, iter([items]), None)
        assert stage.length(ranked) == ranked.tokens
    batches: list[int] = []
    lm.model.embed_tokens.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    check(engine, stage, lambda ranks: items, expected)
    assert (max(batches) == 1) is joined


def config(**changes) -> RewardConfig:
    return RewardConfig(**FLAGS | {"data_path": "D"} | changes)


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
    items, rows = comparisons()[:2], []

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


@pytest.mark.parametrize("max_tokens", [1000, 16, 1])
def test_held_out_scores_do_not_depend_on_the_batches(max_tokens):
    items = comparisons()
    plan = partial(rank_plan, max_tokens=max_tokens, num_ranks=1, rank=0)
    scored, nll = score_comparisons(ENGINE, items, plan)
    expected = torch.stack([score(ids) for item in items for ids in item.answers])
    torch.testing.assert_close(scored.scores, expected)
    assert nll == 0.0


def test_a_dummy_forward_pass_changes_nothing():
    items, model, plans = comparisons(), copy.deepcopy(ENGINE.module), ([([1, 2], 1.0)], [([1, 2], 1.0), ([0], 0.0)])
    model.lm_head = torch.nn.Linear(32, VOCAB_SIZE, bias=False)
    results = [score_comparisons(InferenceEngine(model), items, lambda _, p=plan: p, with_lm=True) for plan in plans]
    (alone, nll), (kept, nll_kept) = results
    assert torch.equal(kept.scores, alone.scores) and nll_kept == nll > 0
    assert kept.scores[:2].tolist() == [0, 0] and kept.scores[2:].all()
    engine = trained_part(0.3)
    cached = (cache_gradients(engine, items, lambda _, p=p: p, length, 1.0, random.Random(0)) for p in plans)
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


@pytest.mark.parametrize(("dropout", "max_tokens"), [(0.3, 10_000), (1e-9, 20)])
def test_the_contrastive_gradient_is_that_of_one_graph_over_all_pairs(dropout, max_tokens):
    """In one batch under the same dropout; and, almost without dropout, in three batches."""
    items, engine = comparisons(), trained_part(dropout)
    plan = partial(rank_plan, max_tokens=max_tokens, num_ranks=1, rank=0)
    parts = plan([length(item) for item in items])
    assert len(parts) == (1 if max_tokens > 20 else 3)
    seed = random.Random("s").getrandbits(32)
    members = [items[i] for i in (parts[0][0] if max_tokens > 20 else range(3))]
    features = pair_features(forward_answers(engine, members, dropout_seed=seed).states, members)
    expected = simcse_losses(features[:, 0], features[:, 1], 0.5).sum()
    expected.backward()
    whole = gradients(engine)
    engine.module.zero_grad()
    cached, total = cache_gradients(engine, items, plan, length, 0.5, random.Random("s")), 0.0
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
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert (first[0] - first[1]).abs().max() > 1e-3
    assert torch.equal(torch.get_rng_state(), state)
