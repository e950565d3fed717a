"""Records with several ranked answers to one prompt: {"prompt", "responses"} with optional "scores" or "ranks"."""

from itertools import combinations
from typing import Any

from data.formats.records import BadRecord, Tally
from data.formats.score_columns import read_numbers


def is_ranked(value: Any) -> bool:
    """Returns whether the record has this form."""
    return isinstance(value, dict) and "responses" in value and "chosen" not in value


def ranked_pairs(value: dict, source: str, tally: Tally) -> tuple[list[str], list[tuple[int, int, float | None]]]:
    """Returns (answers, all pairs with different ranks as (better index, worse index, score gap or None)).

    Larger scores are better; rank 1 is the best; without both, the first response. Equal texts make no pair and are
    counted in `tally`. Raises BadRecord if no pair is left.
    """
    responses = value["responses"]
    if not isinstance(responses, list) or len(responses) < 2:
        raise BadRecord("responses is not a list of at least two answers")
    answers = [_text_of(response) for response in responses]
    scores, ranks = read_numbers(value, "scores"), read_numbers(value, "ranks")
    for name, numbers in (("scores", scores), ("ranks", ranks)):
        if numbers is not None and len(numbers) != len(answers):
            raise BadRecord(f"{len(numbers)} {name} for {len(answers)} responses")
    quality = scores or [-rank for rank in ranks or range(len(answers))]
    pairs = []
    for i, j in combinations(range(len(answers)), 2):
        better, worse = (i, j) if quality[i] > quality[j] else (j, i)
        if answers[i].strip() == answers[j].strip():
            tally.add("with the same response twice (these two are not compared)", source)
        elif quality[i] != quality[j]:
            pairs.append((better, worse, scores[better] - scores[worse] if scores else None))
    if not pairs:
        raise BadRecord("no two responses differ in text and rank")
    return answers, pairs


def _text_of(response: Any) -> str:
    """Returns the text of an answer given as a string, an assistant message, or a list with one of them."""
    if isinstance(response, list) and len(response) == 1:
        response = response[0]
    if isinstance(response, dict) and response.get("role", "assistant") == "assistant":
        response = response.get("content")
    if not isinstance(response, str):
        raise BadRecord("a response is neither text nor a message of the assistant")
    return response
