"""Several answers to one prompt, ranked: {"prompt", "responses"}, best first or with "scores" or "ranks"."""

from itertools import combinations
from typing import Any

from data.formats.records import BadRecord, Tally
from data.formats.score_columns import numbers_of


def is_ranked(value: Any) -> bool:
    """Whether the record is of this form."""
    return isinstance(value, dict) and "responses" in value and "chosen" not in value


def ranked_pairs(value: dict, source: str, tally: Tally) -> tuple[list[str], list[tuple[int, int, float | None]]]:
    """(answers, pairs): every two answers of different rank as (place of the better, of the worse, gap).

    gap: the difference of their scores, None without "scores" (larger is better; in "ranks", 1 is the best). Equal
    ranks make no pair; neither do equal texts, which are counted. Raises BadRecord when no pair is left.
    """
    responses = value["responses"]
    if not isinstance(responses, list) or len(responses) < 2:
        raise BadRecord("responses is not a list of at least two answers")
    answers = [_text_of(response) for response in responses]
    scores, ranks = numbers_of(value, "scores"), numbers_of(value, "ranks")
    for name, numbers in (("scores", scores), ("ranks", ranks)):
        if numbers is not None and len(numbers) != len(answers):
            raise BadRecord(f"{len(numbers)} {name} for {len(answers)} responses")
    goodness = scores or ([-rank for rank in ranks] if ranks else [-float(place) for place in range(len(answers))])
    pairs = []
    for i, j in combinations(range(len(answers)), 2):
        better, worse = (i, j) if goodness[i] > goodness[j] else (j, i)
        if answers[i].strip() == answers[j].strip():
            tally.add("with the same response twice, not compared with itself", source)
        elif goodness[i] != goodness[j]:
            pairs.append((better, worse, scores[better] - scores[worse] if scores else None))
    if not pairs:
        raise BadRecord("no two responses differ in text and rank")
    return answers, pairs


def _text_of(response: Any) -> str:
    """The answer in a string, in a message of the assistant, or in a list of one of them."""
    if isinstance(response, list) and len(response) == 1:
        response = response[0]
    if isinstance(response, dict) and response.get("role", "assistant") == "assistant":
        response = response.get("content")
    if not isinstance(response, str):
        raise BadRecord("a response is neither text nor a message of the assistant")
    return response
