"""A step's gradient and loss are those of its whole batch at once, however it is cut into forwards and ranks."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

import tests.helpers.varlen
from data.batching.micro_batch_plan import rank_plan
from data.dialogues import EncodedDialogue
from reward.batches import Comparison
from reward.config import RewardConfig
from reward.model import ScalarHead, ScalarModel, new_head_weight
from reward.stage import build_stage as reward_stage
from sft.config import SFTConfig
from sft.model import AnswerModel
from sft.packed_batches import Layout
from sft.stage import build_stage as sft_stage
from tests.helpers.parts import GradientEngine
from tests.helpers.tiny import tiny_llama
from utils.run.supervised_loop import Stage, train_step

VOCAB = 60
LENGTHS = [23, 5, 12, 3, 9, 2, 17, 8, 4, 30, 6, 11]
FLAGS = {"hf_model_name_or_path": "M", "model_save_path": "O", "dtype": "fp32", "zero_stage": 0}
CUTS = [(1, 1), (40, 1), (64, 2), (1, 3), (10_000, 3)]  # (tokens of a forward, ranks)


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
    engine, stage = KeptEngine(AnswerModel(lm)), sft_stage(config, lm, None, layout, [items], [])
    plain = Layout(False, flat=False, max_tokens=64)
    expected = over_ranks(engine, replace(stage, sums=partial(stage.sums, layout=plain)), plain.rows(items, 1), 9999, 1)
    if how == "joined":
        tests.helpers.varlen.on_cpu(monkeypatch)
        assert [sum(LENGTHS[i] for i in part) for part, _ in stage.plan(LENGTHS)] == [
            30 + 23,
            17 + 12 + 11 + 9 + 8 + 6,
            14,
        ]
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
    engine, stage = KeptEngine(model), reward_stage(config, model, None, items, None)
    expected = over_ranks(engine, stage, items, 10_000, 1)
    if joined:
        tests.helpers.varlen.on_cpu(monkeypatch)
        stage = reward_stage(config, model, None, items, None)
        assert stage.length(ranked) == ranked.tokens
        assert stage.plan([3000, 3000, 2000]) == [([0, 1, 2], 1.0)]
    batches: list[int] = []
    lm.model.embed_tokens.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    check(engine, stage, lambda ranks: items, expected)
    check(engine, stage, lambda ranks: items[::-1], expected)
    assert (max(batches) == 1) is joined
