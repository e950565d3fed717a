"""Trains a reward model on pairs of answers:   python -m reward.train --hf_model_name_or_path … --data_path …

Loss: -E[log sigmoid(chosen - rejected)] + beta x cross entropy of the chosen answer (Part I eq. 2, signs mended).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import torch

from data.collate import pad
from data.preferences import Preference, load_preferences
from data.prompts import without_oldest
from data.shares import rank_plan
from data.template import encode_dialogue, template_for
from data.window import encode_fitting
from reward.batches import MAX_PAIRS, MIN_PAIRS, EncodedPair, dynamic_batches
from reward.loss import ranking_hits, ranking_losses
from reward.model import ScalarModel, last_scores, load_scalar_model, save_scalar_model
from utils.args import check_range, entry_point, parse_args
from utils.checkpoint import prepare_run_folder
from utils.distributed import is_main, rank, world_size
from utils.engine import DTYPES, TrainEngine, device, init_distributed, shutdown_distributed
from utils.errors import UserError
from utils.fit import Stage, fit
from utils.fit_config import FitConfig
from utils.logger import RunLogger, check_outputs
from utils.models import check_window, enable_checkpointing
from utils.tokenizer import load_tokenizer


@dataclass
class RewardConfig(FitConfig):
    """Train a reward model on preferences."""

    model_save_path: str = "outputs/reward"
    """Folder of the run: config.json, metrics.jsonl, best/, final/"""
    lr: float = 5e-6
    """Peak learning rate"""
    batch_size: int = 32
    """Pairs an optimizer step over all ranks, at the mean length: a step takes 4 to 128 pairs by their token count"""
    reward_lm_loss_factor: float = 0.0
    """Weight of the language-model loss on the chosen answer (beta; 1 in Part I)"""
    validation_metric: Literal["accuracy", "loss"] = "accuracy"
    """What picks best/: the highest held-out accuracy (a tie counts half) or the lowest loss"""
    delimiter: str | None = None
    """What ends every utterance. Only the tokenizer's own EOS, the default, is in use with our templates"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, reward_lm_loss_factor=(0, None))
        if not MIN_PAIRS <= self.batch_size <= MAX_PAIRS:
            raise UserError(f"--batch_size {self.batch_size}: give {MIN_PAIRS} to {MAX_PAIRS} pairs, over all ranks")


def encode_pair(tokenizer, preference: Preference, template: str, max_tokens: int) -> tuple[EncodedPair | None, int]:
    """(the pair as ids, how many turns of its history were left out): the oldest go until both dialogues fit.

    The answers stay whole, with their EOS. None when even the last question and the answers are too long.
    """
    history = preference.history
    while history:
        sides = [
            encode_dialogue(tokenizer, [*history, {"role": "assistant", "content": answer}], template)
            for answer in (preference.chosen, preference.rejected)
        ]
        if max(len(ids) for ids, _ in sides) <= max_tokens:
            (chosen, mask), (rejected, _) = sides
            # The answer is the last stretch of the mask; earlier answers belong to the history here.
            prompt_length = len(mask) - mask[::-1].index(False)
            pair = EncodedPair(chosen, rejected, prompt_length, preference.source)
            return pair, len(preference.history) - len(history)
        history = without_oldest(history)
    return None, 0


def load_pairs(
    config: RewardConfig, tokenizer, say: Callable[[str], None]
) -> tuple[list[EncodedPair], list[EncodedPair]]:
    """(train, valid) pairs of --data_path. UserError when too few are left for a batch."""
    template = template_for(config.lang, config.template)
    splits = load_preferences(config.data_path, config.num_valid, config.seed, say)
    encode = partial(encode_pair, tokenizer, template=template, max_tokens=config.context_truncate)
    train, valid = (encode_fitting(split, encode, "pairs", say) for split in splits)
    if len(train) < config.batch_size:
        raise UserError(
            f"--data_path {config.data_path}: {len(train)} pairs to train on are fewer than --batch_size "
            f"{config.batch_size}; add data, lower --batch_size or raise --context_truncate"
        )
    return train, valid


def pair_sums(engine: Callable, pairs: list[EncodedPair], with_lm: bool) -> dict[str, torch.Tensor]:
    """Sums over pairs of loss, right rankings and score difference; over chosen answers' tokens of their NLL.

    engine: a ScalarModel, or the engine around it. Chosen and rejected answers go through one forward.
    """
    ids, mask = pad([pair.chosen for pair in pairs] + [pair.rejected for pair in pairs], 0)
    answers = None
    if with_lm:
        starts = torch.tensor([pair.prompt_length for pair in pairs] + [ids.shape[1]] * len(pairs))
        answers = (mask & (torch.arange(ids.shape[1]) >= starts[:, None])).to(device())
    ids, mask = ids.to(device()), mask.to(device())
    values, nll = engine(ids, mask, answers) if with_lm else (engine(ids, mask), None)
    chosen, rejected = last_scores(values, mask).chunk(2)
    sums = {
        "ranking_loss": ranking_losses(chosen, rejected).sum(),
        "accuracy": ranking_hits(chosen, rejected).sum(),
        "score_difference": (chosen - rejected).sum(),
    }
    return sums | ({"lm_loss": nll} if with_lm else {})


def pair_counts(pairs: list[EncodedPair], with_lm: bool) -> dict[str, float]:
    """What the sums of `pair_sums` are divided by: pairs, and tokens of chosen answers."""
    counts = dict.fromkeys(("ranking_loss", "accuracy", "score_difference"), len(pairs))
    if with_lm:
        counts["lm_loss"] = sum(len(pair.chosen) - pair.prompt_length for pair in pairs)
    return counts


def stage_of(config: RewardConfig, model: ScalarModel, tokenizer, train: list[EncodedPair]) -> Stage:
    """The reward model's part in `utils.fit`."""
    with_lm = config.reward_lm_loss_factor > 0
    least = max(MIN_PAIRS, world_size())
    indices = dynamic_batches([pair.tokens for pair in train], config.batch_size, config.seed, least)
    return Stage(
        batches=([train[i] for i in batch] for batch in indices),
        length=lambda pair: pair.padded,
        plan=lambda lengths: rank_plan(lengths, config.micro_batch_tokens, world_size(), rank()),
        sums=partial(pair_sums, with_lm=with_lm),
        counts=partial(pair_counts, with_lm=with_lm),
        loss_weights={"ranking_loss": 1.0} | ({"lm_loss": config.reward_lm_loss_factor} if with_lm else {}),
        best_by=config.validation_metric,
        larger_is_better=config.validation_metric == "accuracy",
        save=lambda state, folder: save_scalar_model(model, folder, state, tokenizer),
    )


def train(config: RewardConfig) -> None:
    """One run, from flags to final/. Nothing is written before model and data are loaded and found to be usable."""
    check_outputs(config)
    init_distributed()
    if config.batch_size < world_size():
        raise UserError(f"--batch_size {config.batch_size} is less than the {world_size()} ranks: give at least that")
    say = partial(print, flush=True) if is_main() else lambda text: None
    tokenizer = load_tokenizer(config.tokenizer_name_or_path, template_for(config.lang, config.template))
    if config.delimiter not in (None, tokenizer.eos_token):
        raise UserError(f"--delimiter {config.delimiter!r}: utterances end in {tokenizer.eos_token!r}; leave it out")
    train_pairs, valid_pairs = load_pairs(config, tokenizer, say)
    with_lm = config.reward_lm_loss_factor > 0
    dtype, attention = DTYPES[config.dtype], config.attn_implementation
    path, seed = config.hf_model_name_or_path, config.seed
    model = load_scalar_model(path, dtype, device(), attention, tokenizer, with_lm, seed, say)
    check_window(model, config.context_truncate, "--context_truncate")
    model.even_tokens = config.even_tokens
    if config.gradient_checkpoint:
        enable_checkpointing(model.backbone)
    prepare_run_folder(config.model_save_path, config.overwrite, config)
    log = RunLogger(config.model_save_path, config.logdir, config.report_to, asdict(config), config.train_steps)
    try:
        engine = TrainEngine(model, config, "reward model")
        fit(engine, stage_of(config, model, tokenizer, train_pairs), valid_pairs, config, log)
    finally:
        log.close()
    shutdown_distributed()


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m reward.train`."""
    train(parse_args(RewardConfig, argv))


if __name__ == "__main__":
    main()
