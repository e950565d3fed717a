"""Trains a reward model on compared answers:   python -m reward.train --hf_model_name_or_path … --data_path …

Loss: -E[log sigmoid(chosen - rejected)] + beta x cross entropy of the chosen answer (Part I eq. 2, signs mended), and
what Part II adds to it by flags: margin, smoothing, flipped labels, a contrastive term.
"""

import random
import sys
from collections.abc import Callable
from functools import partial

import torch
from transformers import PreTrainedTokenizerBase

from data.batching.micro_batch_plan import rank_plan
from data.choose_template import first_prompt, settle
from reward.batches import MIN_PAIRS, Comparison, dynamic_batches, pair_index
from reward.config import RewardConfig
from reward.contrastive import contrast_sum, with_pulls
from reward.encode import load_center_answers, load_comparisons
from reward.forward import Plan, held_out, read_answers
from reward.loss import ranking_hits, ranking_losses
from reward.metrics import held_out_metrics, mean_best
from reward.model import ScalarModel, check_scalar_export, load_scalar_model, save_scalar_model, set_dropout
from utils.deterministic import repeatable
from utils.distributed import rank, world_size
from utils.engine.engine import DTYPES, TrainEngine, device, device_room, shutdown_distributed
from utils.errors import UserError
from utils.flags.parser import entry_point, parse_args
from utils.memory.recompute import settle_checkpointing
from utils.models.compile import compile_layers
from utils.models.load import FLAG, check_window, enable_checkpointing
from utils.run.start import open_log, start_run
from utils.run.supervised_loop import Stage, fit


def comparison_sums(engine: Callable, items: list[Comparison], config: RewardConfig) -> dict[str, torch.Tensor]:
    """Sums over prompts of loss, right rankings and score difference; over the best answers' tokens of their NLL; over
    pairs of the contrastive loss. engine: a ScalarModel, or the engine around it."""
    with_lm, pull = config.reward_lm_loss_factor > 0, items[0].pull
    reading = read_answers(engine, items, with_lm, pull and pull.seed)
    index = pair_index(items).to(reading.scores.device)
    better, worse, weights = reading.scores[index.better], reading.scores[index.worse], index.weights
    sums = {
        "ranking_loss": (weights * ranking_losses(better, worse, index.margins, config.label_smoothing)).sum(),
        "accuracy": (weights * ranking_hits(better, worse)).sum(),
        "score_difference": (weights * (better - worse)).sum(),
    }
    if with_lm:
        sums["lm_loss"] = reading.nll
    if pull:
        sums["simcse_loss"] = contrast_sum(reading.states, items)
    return sums


def comparison_counts(items: list[Comparison], config: RewardConfig) -> dict[str, float]:
    """What the sums of `comparison_sums` are divided by: prompts; tokens of best answers; pairs."""
    counts = dict.fromkeys(("ranking_loss", "accuracy", "score_difference"), len(items))
    if config.reward_lm_loss_factor:
        counts["lm_loss"] = sum(item.answer_lengths[item.best] for item in items)
    if config.simcse_coef:
        counts["simcse_loss"] = sum(len(item.pairs) for item in items)
    return counts


class HeldOut:
    """The evaluation of a run, which also finds the score that the next saved model takes for 0."""

    def __init__(self, config: RewardConfig, plan: Plan, answers: list[Comparison] | None):
        """answers: those whose mean score is to be 0; None: the best of the held-out comparisons."""
        self.config = config
        self.plan = plan
        self.answers = answers
        self.state = {"center": 0.0}  # of the scores as the last evaluation saw them

    def __call__(self, engine: TrainEngine, items: list[Comparison]) -> dict[str, float]:
        """Metrics of held-out comparisons. Collective."""
        factor = self.config.reward_lm_loss_factor
        scored, nll = held_out(engine, items, self.plan, factor > 0)
        metrics = held_out_metrics(scored)
        if factor:
            lm_loss = nll / sum(item.answer_lengths[item.best] for item in items)
            ranking_loss = metrics["loss"]
            metrics |= {"loss": ranking_loss + factor * lm_loss, "ranking_loss": ranking_loss, "lm_loss": lm_loss}
        if self.config.center_scores:
            others = held_out(engine, self.answers, self.plan)[0].scores if self.answers else None
            self.state["center"] = mean_best(scored) if others is None else float(others.mean())
            metrics["score_center"] = self.state["center"]
        return metrics


def stage_of(
    config: RewardConfig, model: ScalarModel, tokenizer, train: list[Comparison], answers: list[Comparison] | None
) -> Stage:
    """The reward model's part in `utils.run.supervised_loop`. answers: as in `HeldOut`."""
    least = max(MIN_PAIRS, world_size())
    indices = dynamic_batches([item.tokens for item in train], config.batch_size, config.seed, least)
    views = 2 if config.simcse_coef else 1
    joined = model.trains_joined and views == 1

    def length(item: Comparison) -> int:
        return views * (item.tokens if joined else item.padded)

    def plan(lengths: list[int]) -> list[tuple[list[int], float]]:
        return rank_plan(lengths, config.micro_batch_tokens, world_size(), rank(), joined)

    evaluation = HeldOut(config, plan, answers)
    # Seeds come from the global stream: it differs from rank to rank, and a checkpoint keeps it.
    pulls = partial(with_pulls, plan=plan, length=length, temperature=config.simcse_temperature, seeds=random)
    weights = {"lm_loss": config.reward_lm_loss_factor, "simcse_loss": config.simcse_coef}
    return Stage(
        batches=([train[i] for i in batch] for batch in indices),
        length=length,
        plan=plan,
        sums=partial(comparison_sums, config=config),
        counts=partial(comparison_counts, config=config),
        loss_weights={"ranking_loss": 1.0} | {name: weight for name, weight in weights.items() if weight},
        best_by=config.validation_metric,
        larger_is_better=config.larger_is_better,
        save=lambda state, folder: save_scalar_model(model, folder, state, tokenizer, evaluation.state["center"]),
        prepare=pulls if config.simcse_coef else None,
        evaluate=evaluation,
        state=evaluation.state,
    )


def load(config: RewardConfig, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]) -> ScalarModel:
    """The model to train, with what the flags want of it."""
    path, dtype, attention = config.hf_model_name_or_path, DTYPES[config.dtype], config.attn_implementation
    with_lm = config.reward_lm_loss_factor > 0
    model = load_scalar_model(path, dtype, device(), attention, tokenizer, with_lm, config.seed, say)
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


def train(config: RewardConfig) -> None:
    """One run, from flags to final/. Nothing is written before model and data are loaded and found to be usable."""
    say, start = start_run(config)
    if config.batch_size < world_size():
        raise UserError(f"--batch_size {config.batch_size} is less than the {world_size()} ranks: give at least that")
    models = [(FLAG, config.hf_model_name_or_path)]
    tokenizer, _ = settle(config, config.tokenizer_name_or_path, models, say)
    if config.delimiter not in (None, tokenizer.eos_token):
        raise UserError(f"--delimiter {config.delimiter!r}: utterances end in {tokenizer.eos_token!r}; leave it out")
    items, held_out_items = load_comparisons(config, tokenizer, say)
    say(first_prompt(tokenizer, items[0].answers[0][: items[0].prompt_length]))
    if config.center_scores and not held_out_items:
        raise UserError("--center_scores needs an evaluation: give a *valid* file, or a --num_valid above 0")
    answers = load_center_answers(config, tokenizer, say) if config.center_data_path else None
    model = load(config, tokenizer, say)
    log = open_log(config, start, config.train_steps)
    try:
        engine = TrainEngine(model, config, "reward model")
        stage = stage_of(config, model, tokenizer, items, answers)
        tokens = max(config.micro_batch_tokens, *map(stage.length, items))
        settle_checkpointing(engine, model.backbone, config, tokens, device_room(), log.say)
        code = fit(engine, stage, held_out_items, config, log, start)
    finally:
        log.close()
    shutdown_distributed()
    if code:
        sys.exit(code)


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m reward.train`."""
    config = parse_args(RewardConfig, argv)
    with repeatable(config.deterministic):
        train(config)


if __name__ == "__main__":
    main()
