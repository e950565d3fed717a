"""Score preferences with one or several trained reward models; used by reward.evaluate and reward.strength."""

import sys
from collections.abc import Iterable

from tqdm import tqdm

from data.batching.micro_batch_plan import rank_plan
from data.choose_template import first_prompt
from data.encoded import form_options
from data.preferences import Preference, load_preferences
from reward.encode import encode_all
from reward.evaluation.flags import EvaluateConfig, EvaluationFlags
from reward.forward import score_comparisons
from reward.metrics import ScoredItems
from reward.scoring.ensemble import check_labels
from reward.scoring.score_records import load_reward_model
from utils.engine.engine import InferenceEngine
from utils.errors import Say, UserError
from utils.models.load import check_window, window_of
from utils.run.start import choose_dtype

FLAG = "--model"


def load_evaluation_set(config: EvaluateConfig) -> list[Preference]:
    """Returns the valid set of --data_path, or all data without one. Raises UserError for an unknown subset."""
    train, valid = load_preferences(config.data_path, config, options=form_options(config))
    preferences = valid or train
    print(f"evaluated on {'the held-out' if valid else 'all'} data: {len(preferences)} preferences")
    existing = sorted({preference.subset for preference in preferences})
    for subset in config.subsets:
        if subset not in existing:
            raise UserError(f"--subsets {subset}: not a subset of --data_path; use {', '.join(existing)}")
    return [p for p in preferences if not config.subsets or p.subset in config.subsets]


def score_preferences(preferences: list[Preference], config: EvaluationFlags, say: Say) -> list[ScoredItems]:
    """Returns each model's scores of the preferences that fit the windows of all models.

    Each model uses its own tokenizer and template; one model is in memory at a time. `place` of an item is its index in
    `preferences`. Raises UserError for folders that are not reward models of the same labels.
    """
    choose_dtype(config)
    check_labels(config.model, FLAG)
    models = [_scored(path, preferences, config, say) for path in config.model]
    common = set.intersection(*({item.place for item in scored.items} for scored in models))
    if not common:
        raise UserError(
            f"--data_path {' '.join(config.data_path)}: no preference fits all models' windows; use shorter ones"
        )
    return [scored.where(lambda item: item.place in common) for scored in models]


def _scored(path: str, preferences: list[Preference], config: EvaluationFlags, say: Say) -> ScoredItems:
    model, tokenizer, template = load_reward_model(path, config, say)
    window = config.context_truncate or window_of(model)
    if window:
        check_window(model, window, "--context_truncate")
    items = encode_all(preferences, tokenizer, template, window or sys.maxsize, say)
    if not items:
        raise UserError(
            f"--data_path {' '.join(config.data_path)}: no preference fits the {window} tokens of {path}; use others"
        )
    say(first_prompt(tokenizer, items[0].answers[0][: items[0].prompt_length]))

    def plan(lengths: list[int]) -> Iterable[tuple[list[int], float]]:
        parts = rank_plan(lengths, config.micro_batch_tokens, num_ranks=1, rank=0, joined=model.trains_joined)
        return tqdm(parts, desc=path, unit="batch", disable=None)

    scored, _ = score_comparisons(InferenceEngine(model), items, plan)
    if not bool(scored.scores.isfinite().all()):
        raise UserError(f"{FLAG}: {path} returns scores that are not finite; use --dtype fp32, or another model")
    return scored
