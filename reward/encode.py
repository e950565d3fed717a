"""Load preferences and encode them as comparisons; all answers to a prompt are truncated in the same way."""

from dataclasses import replace
from functools import partial
from itertools import count

from transformers import PreTrainedTokenizerBase

from data.dialogues import load_dialogues
from data.formats.truncate import encode_fitting, newest_turns
from data.order import order
from data.preferences import MARGIN_COLUMNS, Preference, check_margins, flip_negative, load_preferences
from data.template import Turns, encode_answered
from reward.batches import MIN_PAIRS, Comparison
from reward.config import RewardConfig
from utils.distributed import world_size
from utils.errors import Say, UserError
from utils.flags.checks import is_default
from utils.run.together import once_per_node
from utils.tokenizer import template_of

CENTER_ANSWERS = 1000  # maximum number of answers of --center_data_path, scored in each evaluation


def encode_preference(
    preference: Preference, tokenizer: PreTrainedTokenizerBase, template: str, max_tokens: int
) -> tuple[Comparison | None, int]:
    """Returns (comparison, number of turns removed from the history); the oldest go until all answers fit.

    All answers lose the same turns, so that their scores are comparable. The comparison is None if the last question
    with the longest answer is too long.
    """

    def fit(history: Turns) -> list[tuple[list[int], list[int], int]] | None:
        answers = ([*history, {"role": "assistant", "content": answer}] for answer in preference.answers)
        sides = [encode_answered(tokenizer, turns, template) for turns in answers]
        return sides if max(len(prompt) + len(answer) for prompt, answer, _ in sides) <= max_tokens else None

    history, sides = newest_turns(preference.history, fit, max_tokens)
    if sides is None:
        return None, 0
    prompt, answer, trained = sides[0]
    comparison = Comparison(
        [prompt + answer for prompt, answer, _ in sides], len(prompt),
        [(pair.better, pair.worse) for pair in preference.pairs], [pair.margin or 0.0 for pair in preference.pairs],
        preference.subset, preference.source, suffix_length=len(answer) - trained,
    )  # fmt: skip
    return comparison, len(preference.history) - len(history)


def encode_all(
    preferences: list[Preference], tokenizer: PreTrainedTokenizerBase, template: str, max_tokens: int,
    say: Say,
) -> list[Comparison]:  # fmt: skip
    """Returns the comparisons that fit; reports what was truncated or dropped, and the subsets that are now empty."""
    places = count()

    def encode(preference: Preference) -> tuple[Comparison | None, int]:
        place = next(places)
        item, cut = encode_preference(preference, tokenizer, template, max_tokens)
        return item and replace(item, place=place), cut

    kept = encode_fitting(preferences, encode, "preferences", say)
    for subset in sorted({p.subset for p in preferences} - {item.subset for item in kept}):
        say(f"preferences: no preference of the subset {subset!r} is left")
    return kept


def load_comparisons(
    config: RewardConfig, tokenizer: PreTrainedTokenizerBase, say: Say
) -> tuple[list[Comparison], list[Comparison]]:
    """Returns (train, valid) comparisons of --data_path; --flip_negative applies to the training set only."""
    train, valid, held_out = once_per_node(partial(_read_comparisons, config, tokenizer, say))
    config.fit_batch(len(train), max(MIN_PAIRS, world_size()))
    if len(train) < config.batch_size:
        few = f"{len(train)} pairs to train on are fewer than --batch_size {config.batch_size}"
        raise UserError(f"--data_path {config.data_path}: {few}; add data, lower it or raise --context_truncate")
    if held_out and not valid:
        limit = f"--context_truncate {config.context_truncate}"
        raise UserError(f"--data_path {config.data_path}: no held-out pair fits {limit}; raise it (or --num_valid 0)")
    return train, valid


def _read_comparisons(config: RewardConfig, tokenizer, say: Say) -> tuple[list[Comparison], list[Comparison], int]:
    """Returns training and held-out comparisons, and the number of held-out records."""
    template, columns = template_of(tokenizer), ()
    if config.use_margin:
        columns = (config.margin_column,) if config.margin_column else MARGIN_COLUMNS
    lower = is_default(config, "num_valid")
    train, valid = load_preferences(config.data_path, config.num_valid, config.seed, say, columns, lower)
    if config.flip_negative:
        train = flip_negative(train, say)
    if config.use_margin:
        check_margins(train, columns, say)
    encoded = [encode_all(split, tokenizer, template, config.context_truncate, say) for split in (train, valid)]
    return *encoded, len(valid)


def load_center_answers(config: RewardConfig, tokenizer: PreTrainedTokenizerBase, say: Say) -> list[Comparison]:
    """Returns up to CENTER_ANSWERS answers of --center_data_path, chosen by the seed, as comparisons without pairs."""
    return once_per_node(partial(_read_center_answers, config, tokenizer, say))


def _read_center_answers(config: RewardConfig, tokenizer, say: Say) -> list[Comparison]:
    flag = "--center_data_path"
    dialogues, _ = load_dialogues(config.center_data_path, 0, config.seed, say, flag)
    indices = order(0, min(CENTER_ANSWERS, len(dialogues)), len(dialogues), config.seed)
    drawn = (dialogues[i] for i in indices)
    answers = [Preference(d.turns[:-1], [d.turns[-1]["content"]], [], "", d.source) for d in drawn]
    template = template_of(tokenizer)
    encoded = encode_all(answers, tokenizer, template, config.context_truncate, say)
    if not encoded:
        raise UserError(f"{flag} {config.center_data_path}: no answer fits --context_truncate; raise it")
    return encoded
