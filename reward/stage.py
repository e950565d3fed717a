"""Loss, evaluation and model of reward training, for utils/run/supervised_loop.py."""

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from data.batching.micro_batch_plan import rank_plan
from reward.batches import Comparison, pair_index
from reward.config import RewardConfig
from reward.contrastive import cache_gradients, contrastive_loss_sum
from reward.forward import Plan, forward_answers, score_comparisons
from reward.loss import ranking_hits, ranking_losses
from reward.metrics import evaluation_metrics, mean_best_score
from reward.model import (
    ScalarModel,
    check_scalar_export,
    load_scalar_model,
    save_scalar_adapter,
    save_scalar_model,
    set_dropout,
)
from utils.distributed import rank, world_size
from utils.engine.engine import DTYPES, TrainEngine, device
from utils.engine.split import splitter
from utils.errors import Say
from utils.models.compile import compile_layers
from utils.models.load import FLAG, check_window, enable_checkpointing
from utils.run.supervised_loop import FitState, Stage


class RewardState(FitState):
    """What a checkpoint of reward training holds: also `Evaluation.state`."""

    stage: Annotated[dict[Literal["center"], float], Field(min_length=1)]


def comparison_sums(engine: Callable, items: list[Comparison], config: RewardConfig) -> dict[str, torch.Tensor]:
    """Returns sums of loss, accuracy and score difference over prompts, of the NLL over the best answers' tokens, and
    of the contrastive loss over pairs. engine: a ScalarModel, or the engine around it.
    """
    with_lm, cached_gradient = config.reward_lm_loss_factor > 0, items[0].cached_gradient
    reading = forward_answers(engine, items, with_lm, cached_gradient and cached_gradient.seed)
    index = pair_index(items).to(reading.scores.device)
    better, worse, weights = reading.scores[index.better], reading.scores[index.worse], index.weights
    sums = {
        "ranking_loss": (weights * ranking_losses(better, worse, index.margins, config.label_smoothing)).sum(),
        "accuracy": (weights * ranking_hits(better, worse)).sum(),
        "score_difference": (weights * (better - worse)).sum(),
    }
    if with_lm:
        sums["lm_loss"] = reading.nll
    if cached_gradient:
        sums["simcse_loss"] = contrastive_loss_sum(reading.states, items)
    return sums


def comparison_counts(items: list[Comparison], config: RewardConfig) -> dict[str, float]:
    """Returns the denominators of `comparison_sums`: numbers of prompts, tokens of the best answers, and pairs."""
    counts = dict.fromkeys(("ranking_loss", "accuracy", "score_difference"), len(items))
    if config.reward_lm_loss_factor:
        counts["lm_loss"] = sum(item.answer_lengths[item.best] for item in items)
    if config.simcse_coef:
        counts["simcse_loss"] = sum(len(item.pairs) for item in items)
    return counts


class Evaluation:
    """Evaluates held-out comparisons, and computes the score center of the next saved model."""

    def __init__(self, config: RewardConfig, plan: Plan, answers: list[Comparison] | None):
        """answers: answers whose mean score becomes 0; None: the best answers of the held-out comparisons."""
        self.config = config
        self.plan = plan
        self.answers = answers
        self.state = {"center": 0.0}  # mean score in the last evaluation

    def __call__(self, engine: TrainEngine, items: list[Comparison]) -> dict[str, float]:
        """Returns the metrics of held-out comparisons. Collective."""
        factor = self.config.reward_lm_loss_factor
        scored, nll = score_comparisons(engine, items, self.plan, factor > 0)
        metrics = evaluation_metrics(scored)
        if factor:
            lm_loss = nll / sum(item.answer_lengths[item.best] for item in items)
            ranking_loss = metrics["loss"]
            metrics |= {"loss": ranking_loss + factor * lm_loss, "ranking_loss": ranking_loss, "lm_loss": lm_loss}
        if self.config.center_scores:
            others = score_comparisons(engine, self.answers, self.plan)[0].scores if self.answers else None
            self.state["center"] = mean_best_score(scored) if others is None else float(others.mean())
            metrics["score_center"] = self.state["center"]
        return metrics


def build_stage(
    config: RewardConfig,
    model: ScalarModel,
    tokenizer,
    batches: Iterator[list[Comparison]],
    answers: list[Comparison] | None,
) -> Stage:
    """Returns the reward model's `Stage`. answers: as in `Evaluation`."""
    views = 2 if config.simcse_coef else 1
    joined = model.trains_joined and views == 1

    def length(item: Comparison) -> int:
        return views * (item.tokens if joined else item.padded_tokens)

    def plan(lengths: list[int]) -> list[tuple[list[int], float]]:
        return rank_plan(lengths, config.micro_batch_tokens, world_size(), rank(), joined)

    evaluation = Evaluation(config, plan, answers)
    # Seeds come from the global random state, which differs between ranks and is part of checkpoints.
    prepare = partial(cache_gradients, plan=plan, length=length, temperature=config.simcse_temperature, seeds=random)
    weights = {"lm_loss": config.reward_lm_loss_factor, "simcse_loss": config.simcse_coef}
    return Stage(
        batches=batches,
        length=length,
        plan=plan,
        sums=partial(comparison_sums, config=config),
        counts=partial(comparison_counts, config=config),
        loss_weights={"ranking_loss": 1.0} | {name: weight for name, weight in weights.items() if weight},
        best_by=config.validation_metric,
        larger_is_better=config.larger_is_better,
        save=lambda state, folder: save_scalar_model(model, folder, state, tokenizer, evaluation.state["center"]),
        save_adapter=lambda folder: save_scalar_adapter(
            model, config.hf_model_name_or_path, folder, tokenizer, evaluation.state["center"]
        ),
        prepare=prepare if config.simcse_coef else None,
        evaluate=evaluation,
        tokenizer=tokenizer,
        state=evaluation.state,
    )


def load(config: RewardConfig, tokenizer: PreTrainedTokenizerBase, say: Say) -> ScalarModel:
    """Returns the model to train, configured by the flags."""
    path, dtype, attention = config.hf_model_name_or_path, DTYPES[config.dtype], config.attn_implementation
    with_lm = config.reward_lm_loss_factor > 0
    split = splitter(config, dtype)
    model = load_scalar_model(
        path, dtype, device(), attention, tokenizer, with_lm, config.seed, say, split=split,
        merge=not config.lora_rank,
    )  # fmt: skip
    check_window(model, config.context_truncate, "--context_truncate")
    check_scalar_export(model, f"{FLAG} {path}")
    model.even_tokens = config.even_tokens
    if config.simcse_coef:
        set_dropout(model, config.simcse_dropout)
    if config.gradient_checkpoint is True:
        enable_checkpointing(model.backbone)
    if config.compile:
        compile_layers(model.backbone)
    return model
