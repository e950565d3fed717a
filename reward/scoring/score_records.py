"""Score streams of records with reward models, in chunks, on one or several ranks; used by reward.score."""

import math
from collections.abc import Iterable, Iterator
from itertools import islice, zip_longest
from statistics import fmean, pstdev
from typing import Any, TypeVar

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from data.choose_template import first_prompt, prepare_tokenizer
from data.formats.records import BadRecord, Record, Tally
from data.formats.score_columns import is_finite
from data.formats.stream import dialogue_or_text
from data.template import Turns, encode_prompt
from reward.model import ScalarModel, load_scalar_model
from reward.scoring.ensemble import Encoding, Frozen, Member, check_labels, score_dialogues
from reward.scoring.score_flags import ScoreConfig
from reward.win_rate import count_outcomes, render, wilson_interval
from utils.distributed import gather_objects, is_main, rank, world_size
from utils.engine.engine import DTYPES, device
from utils.errors import Say, UserError
from utils.models.load import tokenizer_folder, window_of
from utils.run.start import choose_dtype

Item = TypeVar("Item")
TRUNCATED = "longer than a model's window (oldest turns dropped)"


def load_reward_model(path: str, config, say: Say) -> tuple[ScalarModel, PreTrainedTokenizerBase, str]:
    """Returns (model, tokenizer, template name) of a --model path, with its own tokenizer unless flags give another."""
    flag, dtype, attention = "--model", DTYPES[config.dtype], config.attn_implementation
    source = config.tokenizer_name_or_path or str(tokenizer_folder(path, flag))
    tokenizer, template = prepare_tokenizer(config, source, [(flag, path)], say)
    model = load_scalar_model(path, dtype, device(), attention, tokenizer, say=say, flag=flag, trained=True)
    return model.requires_grad_(False), tokenizer, template


def load_reward_models(config: ScoreConfig, say: Say) -> list[Member]:
    """Returns the reward models of --model."""
    choose_dtype(config)
    check_labels(config.model, "--model")
    members = []
    for path in config.model:
        model, tokenizer, template = load_reward_model(path, config, say)
        window = window_of(model)
        say(f"{path}: window {window or 'unlimited'}")
        members.append(Member(Frozen(model, config.offload_frozen), window, Encoding(tokenizer, template, window)))
    return members


def score_chunk(members: list[Member], dialogues: list[Turns | str], max_tokens: int) -> list[tuple[list[float], bool]]:
    """Returns (scores of all models, whether any truncated it) per dialogue, in order. Ranks share the work."""
    own = dialogues[rank() :: world_size()]
    columns, cuts = [], []
    for member in members:
        with member.model.resident() as model:
            scores, cut = score_dialogues(model, member.encoding, own, max_tokens)
        columns.append(scores)
        cuts.append(cut)
    rows = [(list(s), any(c)) for s, c in zip(zip(*columns, strict=True), zip(*cuts, strict=True), strict=True)]
    shares = gather_objects(rows)
    return [shares[i % len(shares)][i // len(shares)] for i in range(len(dialogues))]


def scored_chunks(
    config: ScoreConfig, members: list[Member], records: Iterator[Record], say: Say
) -> Iterator[list[dict]]:
    """Yields lists of records with their scores, or score null and the reason under "error"; reports how many."""
    tally, count = Tally("records"), 0
    for chunk in in_chunks(records, config.chunk_size):
        parsed = [parse_record(record, tally) for record in chunk]
        dialogues = [found for found, error in parsed if error is None]
        if not count:
            say_first_prompts(members, dialogues, say)
        scored = iter(score_chunk(members, dialogues, config.micro_batch_tokens))
        count += len(dialogues)
        rows = []
        for record, (found, error) in zip(chunk, parsed, strict=True):
            if error is not None:
                own = record.value if isinstance(record.value, dict) else {"record": record.value}
                rows.append(own | {config.column: None, "error": error})
                continue
            scores, cut = next(scored)
            if cut:
                tally.add(TRUNCATED, record.source)
            rows.append(add_scores(record, found, check_finite(scores, record, config.model), config.column))
        yield rows
    tally.report(say)
    if not count:
        reasons = "; ".join(tally.lines()) or "it is empty"
        raise UserError(f"--input {config.input}: no record could be scored ({reasons}); fix the records")
    say(f"records: {count} scored")


def say_first_prompts(members: list[Member], dialogues: list[Turns | str], say: Say) -> None:
    """Prints the first prompt among `dialogues` as each model reads it; texts have no prompt."""
    turns = next((found for found in dialogues if not isinstance(found, str)), None)
    for member in members if turns else []:
        tokenizer, template = member.encoding.tokenizer, member.encoding.template
        say(first_prompt(tokenizer, encode_prompt(tokenizer, turns[:-1], template)))


def in_chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yields lists of at most `size` items, with a progress bar on a terminal."""
    items = iter(items)
    with tqdm(unit=" records", disable=None if is_main() else True) as bar:
        while chunk := list(islice(items, size)):
            yield chunk
            bar.update(len(chunk))


def parse_record(record: Record, tally: Tally) -> tuple[Turns | str | None, str | None]:
    """Returns (dialogue or text, None), or (None, reason) and counts the reason."""
    try:
        return dialogue_or_text(record.value), None
    except BadRecord as error:
        tally.add(f"not scored: {error}", record.source)
        return None, str(error)


def check_finite(scores: list[float], record: Record, paths: list[str]) -> list[float]:
    """Returns the scores. Raises UserError, with file and line, if one is not finite."""
    for score, path in zip(scores, paths, strict=True):
        if not math.isfinite(score):
            raise UserError(f"{record.source}: the score of {path} is not finite; use --dtype fp32, or another model")
    return scores


def add_scores(record: Record, found: Turns | str, scores: list[float], column: str) -> dict:
    """Returns the record as an object with its mean score, and for several models their deviation and all scores."""
    own = record.value
    if not isinstance(own, dict):
        own = {"text": found} if isinstance(found, str) else {"messages": found}
    several = {f"{column}_std": pstdev(scores), f"{column}s": scores} if len(scores) > 1 else {}
    return own | {column: fmean(scores)} | several


def compare(config: ScoreConfig, members: list[Member], streams: list[Iterator[Record]], say: Say) -> tuple[dict, str]:
    """Returns (JSON, text): how often the answer of the first file has the higher score, with 95 % intervals.

    Scores are means over the models, or without --model the scores in the files. Raises UserError, with file and line,
    if the files do not have answers to the same prompts.
    """
    tally, differences = Tally("answers"), []
    for chunk in in_chunks(answer_pairs(config.compare, streams), config.chunk_size):
        both = [answer for pair in chunk for answer in pair]
        if members:
            if not differences:
                say_first_prompts(members, [both[0][1]], say)
            scored = score_chunk(members, [turns for _, turns in both], config.micro_batch_tokens)
            for (record, _), (scores, cut) in zip(both, scored, strict=True):
                check_finite(scores, record, config.model)
                if cut:
                    tally.add(TRUNCATED, record.source)
            means = [fmean(scores) for scores, _ in scored]
        else:
            means = [read_score(record, config.column) for record, _ in both]
        differences += [a - b for a, b in zip(means[::2], means[1::2], strict=True)]
    tally.report(say)
    if not differences:
        raise UserError(f"--compare: {config.compare[0]} is empty; use two files of answers to the same prompts")
    counts = count_outcomes(differences, config.tie_margin)
    shares = {name: wilson_interval(count, len(differences)) for name, count in counts.items()}
    setting = {"files": config.compare, "models": config.model, "prompts": len(differences)}
    title = f"{config.compare[0]} against {config.compare[1]}: {len(differences)} prompts, tie margin "
    title += f"{config.tie_margin:g}, 95 % intervals"
    return setting | {"tie_margin": config.tie_margin} | shares, f"{title}\n{render(shares, counts)}"


def answer_pairs(files: list[str], streams: list[Iterator[Record]]) -> Iterator[list[tuple[Record, Turns]]]:
    """Yields per prompt the answers of the two files as [(record, dialogue), (record, dialogue)]."""
    for records in zip_longest(*streams):
        if None in records:
            source = next(record.source for record in records if record)
            raise UserError(f"{source}: {files[records.index(None)]} has no answer to this prompt; use equal prompts")
        (one, a), (other, b) = pair = [(record, read_answer(record)) for record in records]
        if a[:-1] != b[:-1]:
            raise UserError(f"{other.source}: not the prompt of {one.source}; use files with the same order of prompts")
        yield pair


def read_answer(record: Record) -> Turns:
    """Returns the dialogue of a record. Raises UserError with file and line."""
    try:
        turns = dialogue_or_text(record.value)
    except BadRecord as error:
        raise UserError(f"{record.source}: {error}; fix the record, or remove it from both files") from error
    if isinstance(turns, str):
        raise UserError(f"{record.source}: a text without a prompt; use a dialogue, such as {{prompt, response}}")
    return turns


def read_score(record: Record, column: str) -> float:
    """Returns the score in a record. Raises UserError with file and line."""
    value: Any = record.value.get(column) if isinstance(record.value, dict) else None
    if not is_finite(value):
        raise UserError(f"{record.source}: no number under {column!r}; use --model to score the answers, or --column")
    return float(value)
