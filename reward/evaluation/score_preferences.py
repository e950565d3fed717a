"""Trained reward models on one set of preferences, one after the other: what evaluation and strength share."""

import sys
from collections.abc import Callable, Iterable

from tqdm import tqdm

from data.batching.micro_batch_plan import rank_plan
from data.choose_template import first_prompt, settle
from data.preferences import Preference, load_preferences
from reward.encode import encode_all
from reward.evaluation.flags import EvaluateConfig, PanelFlags
from reward.forward import held_out
from reward.metrics import Scored
from reward.model import load_scalar_model
from reward.scoring.ensemble import check_labels
from utils.engine.engine import DTYPES, InferenceEngine, device
from utils.errors import UserError
from utils.fast_dtype import settle_dtype
from utils.models.load import check_window, model_folder, window_of

FLAG = "--model"


def held_out_preferences(config: EvaluateConfig) -> list[Preference]:
    """The valid part of --data_path, or all of it if there is none. UserError for a subset without a record."""
    train, valid = load_preferences(config.data_path, 0, 0)
    preferences = valid or train
    print(f"evaluated on the {'held-out' if valid else 'whole'} data: {len(preferences)} preferences")
    there = sorted({preference.subset for preference in preferences})
    for subset in config.subsets:
        if subset not in there:
            raise UserError(f"--subsets {subset}: no preference of --data_path is in it; there are {', '.join(there)}")
    return [p for p in preferences if not config.subsets or p.subset in config.subsets]


def score_preferences(preferences: list[Preference], config: PanelFlags, say: Callable[[str], None]) -> list[Scored]:
    """What each model says of the preferences that fit all of their windows; `place` is that in the list.

    Each reads with its own tokenizer and template. One model is in memory at a time. Raises UserError for what is no
    reward model, for labels of different meanings, for scores that are not finite, and when no preference fits.
    """
    settle_dtype(config)
    check_labels(config.model, FLAG)
    models = [_scored(path, preferences, config, say) for path in config.model]
    common = set.intersection(*({item.place for item in scored.items} for scored in models))
    if not common:
        raise UserError(
            f"--data_path {config.data_path}: no preference fits the windows of all models; give shorter ones"
        )
    return [scored.where(lambda item: item.place in common) for scored in models]


def _scored(path: str, preferences: list[Preference], config: PanelFlags, say: Callable[[str], None]) -> Scored:
    dtype, attention = DTYPES[config.dtype], config.attn_implementation
    source = config.tokenizer_name_or_path or str(model_folder(path, FLAG))
    tokenizer, template = settle(config, source, [(FLAG, path)], say)
    model = load_scalar_model(path, dtype, device(), attention, tokenizer, say=say, flag=FLAG, trained=True)
    window = config.context_truncate or window_of(model)
    if window:
        check_window(model, window, "--context_truncate")
    items = encode_all(preferences, tokenizer, template, window or sys.maxsize, say)
    if not items:
        raise UserError(
            f"--data_path {config.data_path}: no preference fits the {window} tokens of {path}; give shorter ones, or "
            "raise --context_truncate"
        )
    say(first_prompt(tokenizer, items[0].answers[0][: items[0].prompt_length]))

    def plan(lengths: list[int]) -> Iterable[tuple[list[int], float]]:
        parts = rank_plan(lengths, config.micro_batch_tokens, num_ranks=1, rank=0, joined=model.trains_joined)
        return tqdm(parts, desc=path, unit="batch")

    scored, _ = held_out(InferenceEngine(model), items, plan)
    if not bool(scored.scores.isfinite().all()):
        raise UserError(f"{FLAG}: {path} gives scores that are not finite; try --dtype fp32, or another model")
    return scored
