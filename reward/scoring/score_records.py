"""The work of reward.score: reward models over streams of records, in chunks, on one rank or several."""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice, zip_longest
from statistics import fmean, pstdev
from typing import Any, TypeVar

from tqdm import tqdm

from data.choose_template import first_prompt, settle
from data.formats.records import BadRecord, Record, Tally
from data.formats.score_columns import is_finite
from data.formats.stream import text_or_answered
from data.template import Turns, encode_prompt
from reward.model import load_scalar_model
from reward.scoring.ensemble import Encoding, Frozen, Member, check_labels, score_dialogues
from reward.scoring.score_flags import ScoreConfig
from reward.win_rate import outcome_counts, render, share_interval
from utils.distributed import gather_objects, is_main, rank, world_size
from utils.engine.engine import DTYPES, device
from utils.errors import UserError
from utils.fast_dtype import settle_dtype
from utils.models.load import model_folder, window_of

Item = TypeVar("Item")


def load_judges(config: ScoreConfig, say: Callable[[str], None]) -> list[Member]:
    """The reward models, each with its tokenizer and the template that this was saved with, unless flags say others."""
    settle_dtype(config)
    check_labels(config.model, "--model")
    members = []
    for path in config.model:
        source = config.tokenizer_name_or_path or str(model_folder(path, "--model"))
        tokenizer, template = settle(config, source, [("--model", path)], say)
        dtype, attention = DTYPES[config.dtype], config.attn_implementation
        model = load_scalar_model(
            path, dtype, device(), attention, tokenizer, say=say, flag="--model", trained=True
        ).requires_grad_(False)
        window = window_of(model)
        say(f"{path}: window {window or 'without end'}")
        members.append(Member(Frozen(model, config.offload_frozen), window, Encoding(tokenizer, template, window)))
    return members


def score_chunk(members: list[Member], dialogues: list[Turns | str], max_tokens: int) -> list[tuple[list[float], bool]]:
    """(each model's score, whether any of them saw it cut) of every dialogue, in order, on every rank.

    Each rank scores every n-th dialogue with all models, one model after the other.
    """
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
    config: ScoreConfig, members: list[Member], records: Iterator[Record], say: Callable[[str], None]
) -> Iterator[list[dict]]:
    """The records of --input with their scores, a list a chunk.

    One that cannot be scored has the score null and says why under "error". Such, and those cut for a model's window,
    are counted and said. Raises UserError when nothing could be scored.
    """
    tally, count = Tally("records"), 0
    for chunk in in_chunks(records, config.chunk_size):
        parsed = [parse(record, tally) for record in chunk]
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
                tally.add("longer than a model's window (oldest turns dropped)", record.source)
            rows.append(with_scores(record, found, checked(scores, record, config.model), config.column))
        yield rows
    for line in tally.lines():
        say(line)
    if not count:
        reasons = "; ".join(tally.lines()) or "it is empty"
        raise UserError(f"--input {config.input}: nothing in it could be scored ({reasons}); mend it")
    say(f"records: {count} scored")


def say_first_prompts(members: list[Member], dialogues: list[Turns | str], say: Callable[[str], None]) -> None:
    """Says how each model sees the first prompt among `dialogues`; a text without template has none."""
    turns = next((found for found in dialogues if not isinstance(found, str)), None)
    for member in members if turns else []:
        tokenizer, template = member.encoding.tokenizer, member.encoding.template
        say(first_prompt(tokenizer, encode_prompt(tokenizer, turns[:-1], template)))


def in_chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one shorter, with a progress bar where someone watches."""
    items = iter(items)
    with tqdm(unit=" records", disable=None if is_main() else True) as bar:
        while chunk := list(islice(items, size)):
            yield chunk
            bar.update(len(chunk))


def parse(record: Record, tally: Tally) -> tuple[Turns | str | None, str | None]:
    """(dialogue or text, None), or (None, why it is neither), which is counted."""
    try:
        return text_or_answered(record.value), None
    except BadRecord as error:
        tally.add(f"not scored: {error}", record.source)
        return None, str(error)


def checked(scores: list[float], record: Record, paths: list[str]) -> list[float]:
    """The scores. Raises UserError when one is not a finite number."""
    for score, path in zip(scores, paths, strict=True):
        if not math.isfinite(score):
            raise UserError(f"{record.source}: the score of {path} is not finite; try --dtype fp32, or another model")
    return scores


def with_scores(record: Record, found: Turns | str, scores: list[float], column: str) -> dict:
    """The record, as an object that our loaders read again, and its score; of several models also what makes it up."""
    own = record.value
    if not isinstance(own, dict):
        own = {"text": found} if isinstance(found, str) else {"messages": found}
    row = own | {column: fmean(scores)}
    if len(scores) > 1:
        row |= {f"{column}_std": pstdev(scores), f"{column}s": scores}
    return row


def compare(
    config: ScoreConfig, members: list[Member], streams: list[Iterator[Record]], say: Callable[[str], None]
) -> tuple[dict, str]:
    """(the comparison, as JSON and as text): how often the first file's answer scores higher, with 95 % intervals.

    Scores are the mean of the models, or without --model those that stand in both files. Raises UserError, naming
    file:line, where the files do not hold answers to the same prompts.
    """
    tally, differences = Tally("answers"), []
    for chunk in in_chunks(answer_pairs(config.compare, streams), config.chunk_size):
        both = [answer for pair in chunk for answer in pair]
        if members:
            if not differences:
                say_first_prompts(members, [both[0][1]], say)
            scored = score_chunk(members, [turns for _, turns in both], config.micro_batch_tokens)
            for (record, _), (scores, cut) in zip(both, scored, strict=True):
                checked(scores, record, config.model)
                if cut:
                    tally.add("longer than a model's window (oldest turns dropped)", record.source)
            means = [fmean(scores) for scores, _ in scored]
        else:
            means = [column_of(record, config.column) for record, _ in both]
        differences += [a - b for a, b in zip(means[::2], means[1::2], strict=True)]
    for line in tally.lines():
        say(line)
    if not differences:
        raise UserError(f"--compare: {config.compare[0]} is empty; give two files of answers to the same prompts")
    counts = outcome_counts(differences, config.tie_margin)
    shares = {name: share_interval(count, len(differences)) for name, count in counts.items()}
    setting = {"files": config.compare, "models": config.model, "prompts": len(differences)}
    title = f"{config.compare[0]} against {config.compare[1]}: {len(differences)} prompts, tie margin "
    title += f"{config.tie_margin:g}, 95 % intervals"
    return setting | {"tie_margin": config.tie_margin} | shares, f"{title}\n{render(shares, counts)}"


def answer_pairs(files: list[str], streams: list[Iterator[Record]]) -> Iterator[list[tuple[Record, Turns]]]:
    """The two files' answers to one prompt after the other, each as (record, dialogue)."""
    for records in zip_longest(*streams):
        if None in records:
            source = next(record.source for record in records if record)
            raise UserError(
                f"{source}: {files[records.index(None)]} has no answer to it; give answers to equal prompts"
            )
        (one, a), (other, b) = pair = [(record, answered(record)) for record in records]
        if a[:-1] != b[:-1]:
            raise UserError(f"{other.source}: another prompt than in {one.source}; give both in the same order")
        yield pair


def answered(record: Record) -> Turns:
    """The dialogue of a record. Raises UserError, naming file:line."""
    try:
        turns = text_or_answered(record.value)
    except BadRecord as error:
        raise UserError(f"{record.source}: {error}; mend it, or leave it out of both files") from error
    if isinstance(turns, str):
        raise UserError(f"{record.source}: a text without a prompt; give a dialogue, as in {{prompt, response}}")
    return turns


def column_of(record: Record, column: str) -> float:
    """The score that a record brings. Raises UserError, naming file:line."""
    value: Any = record.value.get(column) if isinstance(record.value, dict) else None
    if not is_finite(value):
        raise UserError(f"{record.source}: no number under {column!r}; give --model to score the answers, or --column")
    return float(value)
