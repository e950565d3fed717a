"""Load preferences and encode them as comparisons; all answers to a prompt are truncated in the same way."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from data.choose_template import prepare_tokenizer
from data.encode import encode_answers
from data.encoded import Mixture, form_options, load_encoded
from data.formats.columns import FormOptions
from data.formats.dialogue_forms import parse_dialogue
from data.formats.records import FLAG, Record, Tally, parse_each
from data.formats.score_columns import STRENGTH
from data.preferences import MARGIN_COLUMNS, Pair, Preference, parse_preferences
from reward.batches import MIN_PAIRS, Comparison
from reward.config import RewardConfig
from utils.distributed import world_size
from utils.errors import Say, UserError
from utils.flags.checks import is_default
from utils.models.load import FLAG as MODEL
from utils.models.load import window_at
from utils.tokenizer import template_of

CENTER_ANSWERS = 1000  # maximum number of answers of --center_data_path, scored in each evaluation
Row = dict[str, Any]


@dataclass(frozen=True)
class ComparisonEncoder:
    """Makes comparisons of at most `max_tokens` tokens per answer; see data/encoded.py.

    flip: swap the pairs of negative strength (Part II, §2) when an item is made. margin_columns: as of
    `parse_preferences`.
    """

    what: ClassVar[str] = "preferences"
    columns: ClassVar[dict[str, str]] = {
        "prompt": "list<int32>", "answers": "list<list<int32>>", "pairs": "list<int32>", "strengths": "list<double>",
        "margins": "list<double>", "subset": "string", "source": "string", "suffix_length": "int32", "tokens": "int32",
        "padded_tokens": "int32",
    }  # fmt: skip
    tokenizer: PreTrainedTokenizerBase
    template: str
    max_tokens: int
    options: FormOptions
    margin_columns: tuple[str, ...] = ()
    flip: bool = False

    def __call__(self, records: list[Record], tally: Tally) -> list[list[Row] | None]:
        parsed = parse_each(records, lambda record: self.parse(record, tally), tally)
        given = [preference for found in parsed if found for preference in found]
        rows = iter(comparison_rows(given, self.tokenizer, self.template, self.max_tokens, tally))
        found = [None if each is None else [next(rows) for _ in each] for each in parsed]
        return [each and [row for row in each if row] for each in found]

    def parse(self, record: Record, tally: Tally) -> list[Preference]:
        """Returns the preferences of a record. Raises BadRecord with the reason."""
        return parse_preferences(record, tally, self.margin_columns, self.options)

    @property
    def limit(self) -> str:
        """The flag that limits the tokens, and its value."""
        return f"--context_truncate {self.max_tokens}"

    def item(self, row: Row) -> Comparison:
        """Returns the comparison of a row."""
        better, worse, margins = row["pairs"][::2], row["pairs"][1::2], row["margins"]
        pairs = [Pair(*pair) for pair in zip(better, worse, row["strengths"], margins, strict=True)]
        if self.flip:
            pairs = list(map(flipped, pairs))
        return Comparison(
            [row["prompt"] + answer for answer in row["answers"]], len(row["prompt"]),
            [(pair.better, pair.worse) for pair in pairs], [pair.margin or 0.0 for pair in pairs],
            row["subset"], row["source"], suffix_length=row["suffix_length"],
        )  # fmt: skip


@dataclass(frozen=True)
class AnswerEncoder(ComparisonEncoder):
    """Makes comparisons without pairs of the last answers of dialogues."""

    what: ClassVar[str] = "dialogues"

    def parse(self, record: Record, tally: Tally) -> list[Preference]:
        """Returns the dialogue of a record as a preference with one answer. Raises BadRecord with the reason."""
        turns = parse_dialogue(record.value, self.options, tally.once(record.source))
        return [Preference(turns[:-1], [turns[-1]["content"]], [], "", record.source)]


def comparison_rows(
    preferences: list[Preference], tokenizer: PreTrainedTokenizerBase, template: str, max_tokens: int, tally: Tally
) -> list[Row | None]:
    """Returns a row per preference; None if the last question with the longest answer is too long.

    All answers lose the same turns, the oldest, until all fit, so that their scores are comparable.
    """
    encoded = encode_answers(tokenizer, [(p.history, p.answers) for p in preferences], template, max_tokens)
    rows: list[Row | None] = []
    for preference, (history, sides) in zip(preferences, encoded, strict=True):
        if sides is None:
            tally.add("dropped: the last exchange alone exceeds --context_truncate", preference.source)
            rows.append(None)
            continue
        if len(history) < len(preference.history):
            tally.add("truncated (oldest turns dropped) to --context_truncate", preference.source)
        prompt, answer, trained = sides[0]
        lengths = [len(prompt) + len(answer) for _, answer, _ in sides]
        rows.append({
            "prompt": prompt, "answers": [answer for _, answer, _ in sides],
            "pairs": [place for pair in preference.pairs for place in (pair.better, pair.worse)],
            "strengths": [pair.strength for pair in preference.pairs],
            "margins": [pair.margin for pair in preference.pairs], "subset": preference.subset,
            "source": preference.source, "suffix_length": len(answer) - trained, "tokens": sum(lengths),
            "padded_tokens": len(lengths) * max(lengths),
        })  # fmt: skip
    return rows


def flipped(pair: Pair) -> Pair:
    """Returns the pair, swapped if its strength is negative."""
    if pair.strength is None or pair.strength >= 0:
        return pair
    # A margin from the strength column has the sign of the strength; margins by annotators are not negative.
    margin = None if pair.margin is None else abs(pair.margin)
    return Pair(pair.worse, pair.better, -pair.strength, margin)


def encode_all(
    preferences: list[Preference], tokenizer: PreTrainedTokenizerBase, template: str, max_tokens: int,
    say: Say,
) -> list[Comparison]:  # fmt: skip
    """Returns the comparisons that fit; reports what was truncated or dropped, and the subsets that are now empty."""
    encoder, tally = ComparisonEncoder(tokenizer, template, max_tokens, FormOptions()), Tally("preferences")
    rows = comparison_rows(preferences, tokenizer, template, max_tokens, tally)
    tally.report(say)
    kept = [replace(encoder.item(row), place=place) for place, row in enumerate(rows) if row]
    for subset in sorted({p.subset for p in preferences} - {item.subset for item in kept}):
        say(f"preferences: no preference of the subset {subset!r} is left")
    return kept


def load_data(
    config: RewardConfig, say: Say
) -> tuple[PreTrainedTokenizerBase, Mixture[Comparison], list[Comparison], list[Comparison] | None]:
    """Returns (tokenizer, training comparisons, held-out ones, answers of --center_data_path). Collective."""
    models = [(MODEL, config.hf_model_name_or_path)]
    tokenizer, _ = prepare_tokenizer(config, config.tokenizer_name_or_path, models, say)
    if config.delimiter not in (None, tokenizer.eos_token):
        end = tokenizer.eos_token
        raise UserError(f"--delimiter {config.delimiter!r}: utterances end in {end!r}; remove the flag")
    config.fit_window(window_at(config.hf_model_name_or_path))
    train, valid = load_comparisons(config, tokenizer, say)
    if config.center_scores and not valid:
        raise UserError("--center_scores needs an evaluation; add a *valid* file, or use --num_valid above 0")
    return tokenizer, train, valid, load_center_answers(config, tokenizer, say) if config.center_data_path else None


def load_comparisons(
    config: RewardConfig, tokenizer: PreTrainedTokenizerBase, say: Say
) -> tuple[Mixture[Comparison], list[Comparison]]:
    """Returns (train, valid) comparisons; --flip_negative applies to the training set only. Collective."""
    columns = ()
    if config.use_margin:
        columns = (config.margin_column,) if config.margin_column else MARGIN_COLUMNS
    encoder = ComparisonEncoder(
        tokenizer, template_of(tokenizer), config.context_truncate, form_options(config), columns
    )  # fmt: skip
    lower = is_default(config, "num_valid")
    train, valid = load_encoded(config.data_path, encoder, config, config.num_valid, config.seed, say, lower=lower)
    if config.flip_negative:
        report_flips(train, say)
        train = train.made_by(replace(encoder, flip=True))
    if config.use_margin:
        check_margins(train, columns, say)
    path, limit = " ".join(config.data_path), f"--context_truncate {config.context_truncate}"
    config.fit_batch(len(train), max(MIN_PAIRS, world_size()))
    if len(train) < config.batch_size:
        few = f"{len(train)} pairs to train on are fewer than --batch_size {config.batch_size}"
        raise UserError(f"--data_path {path}: {few}; add data, lower it or raise --context_truncate")
    if train.num_held_out and not valid:
        raise UserError(f"--data_path {path}: no held-out pair fits {limit}; raise it (or --num_valid 0)")
    return train, valid


def report_flips(train: Mixture[Comparison], say: Say) -> None:
    """Reports how many pairs of negative strength there are. Raises UserError if no pair has a strength."""
    known, tally = sum(x is not None for row in train.each("strengths") for x in row["strengths"]), Tally("preferences")
    if not known:
        raise UserError(f"--flip_negative: no pair has a {STRENGTH!r}; use python -m reward.strength to add it")
    for row in train.each("strengths", "source"):
        for strength in row["strengths"]:
            if strength is None:
                tally.add(f"without a {STRENGTH!r}, not changed", row["source"])
            elif strength < 0:
                tally.add(f"of {known} flipped, because their {STRENGTH!r} is negative", row["source"])
    tally.report(say)


def check_margins(train: Mixture[Comparison], columns: tuple[str, ...], say: Say) -> None:
    """Reports the number of pairs without a margin, which get margin 0. Raises UserError if no pair has one."""
    tally, known = Tally("preferences"), False
    for row in train.each("margins", "source"):
        for margin in row["margins"]:
            known = known or margin is not None
            if margin is None:
                tally.add("without a margin, trained with margin 0", row["source"])
    if not known:
        names = " or ".join(map(repr, columns))
        raise UserError(f"--use_margin: no pair of {FLAG} has a number in the column {names}; pass --margin_column")
    tally.report(say)


def load_center_answers(config: RewardConfig, tokenizer: PreTrainedTokenizerBase, say: Say) -> list[Comparison]:
    """Returns up to CENTER_ANSWERS answers of --center_data_path, chosen by the seed, as comparisons without pairs."""
    flag = "--center_data_path"
    encoder = AnswerEncoder(tokenizer, template_of(tokenizer), config.context_truncate, form_options(config))
    answers, _ = load_encoded(config.center_data_path, encoder, config, 0, config.seed, say, flag)
    if not len(answers):
        path = " ".join(config.center_data_path)
        raise UserError(f"{flag} {path}: no answer fits --context_truncate; raise it")
    return answers.take(0, min(CENTER_ANSWERS, len(answers)))
