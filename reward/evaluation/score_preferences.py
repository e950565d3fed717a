"""Score preferences with one or several trained reward models; used by reward.evaluate and reward.strength."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tqdm import tqdm

from data.batching.micro_batch_plan import rank_plan
from data.choose_template import first_prompt
from data.preferences import Preference
from reward.encode import encode_all
from reward.forward import score_comparisons
from reward.metrics import ScoredItems
from reward.scoring.ensemble import check_labels
from reward.scoring.score_records import load_reward_model
from utils.engine.engine import InferenceEngine
from utils.errors import UserError
from utils.flags.checks import check_range
from utils.flags.engine import ForwardConfig
from utils.models.load import check_window, window_of

FLAG = "--model"


@dataclass
class PanelConfig(ForwardConfig):
    """Reward models and preferences; one process."""

    model: list[str] = field(default_factory=list)
    """Reward models, folders or hub ids"""
    data_path: str = ""
    """Preferences: a folder of *train.json(l) and *valid.json(l), a file or a hub id"""
    output: str = ""
    """Folder for the results"""
    tokenizer_name_or_path: str | None = None
    """Tokenizer of all models; default: the one in each model's folder"""
    context_truncate: int | None = None
    """Longest dialogue, tokens; the oldest turns of longer ones go first. Default: each model's window"""
    micro_batch_tokens: int = 8192
    """Tokens of a forward pass, padding included: speed and memory only"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("model", "data_path"):
            if not getattr(self, name):
                raise UserError(f"--{name} is missing: give it a path")
        twice = next((path for path in self.model if self.model.count(path) > 1), None)
        if twice:
            raise UserError(f"{FLAG} names {twice} twice: give each reward model once")
        check_range(self, micro_batch_tokens=(1, None))
        if self.context_truncate is not None:
            check_range(self, context_truncate=(1, None))


def score_preferences(
    preferences: list[Preference], config: PanelConfig, say: Callable[[str], None]
) -> list[ScoredItems]:
    """Returns each model's scores of the preferences that fit the windows of all models.

    Each model uses its own tokenizer and template; one model is in memory at a time. `place` of an item is its index in
    `preferences`. Raises UserError for folders that are not reward models, for labels of different meanings, for
    scores that are not finite, and if no preference fits.
    """
    check_labels(config.model, FLAG)
    models = [_scored(path, preferences, config, say) for path in config.model]
    common = set.intersection(*({item.place for item in scored.items} for scored in models))
    if not common:
        raise UserError(
            f"--data_path {config.data_path}: no preference fits the windows of all models; use shorter ones"
        )
    return [scored.where(lambda item: item.place in common) for scored in models]


def _scored(path: str, preferences: list[Preference], config: PanelConfig, say: Callable[[str], None]) -> ScoredItems:
    model, tokenizer, template = load_reward_model(path, config, say)
    window = config.context_truncate or window_of(model)
    if window:
        check_window(model, window, "--context_truncate")
    items = encode_all(preferences, tokenizer, template, window or sys.maxsize, say)
    if not items:
        raise UserError(
            f"--data_path {config.data_path}: no preference fits the {window} tokens of {path}; use shorter ones, or "
            "raise --context_truncate"
        )
    say(first_prompt(tokenizer, items[0].answers[0][: items[0].prompt_length]))

    def plan(lengths: list[int]) -> Iterable[tuple[list[int], float]]:
        parts = rank_plan(lengths, config.micro_batch_tokens, num_ranks=1, rank=0, joined=model.trains_joined)
        return tqdm(parts, desc=path, unit="batch")

    scored, _ = score_comparisons(InferenceEngine(model), items, plan)
    if not bool(scored.scores.isfinite().all()):
        raise UserError(f"{FLAG}: {path} returns scores that are not finite; use --dtype fp32, or another model")
    return scored
