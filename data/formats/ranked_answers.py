"""Parse the forms of a preference with several answers, which scores, ranks or their places order."""

from itertools import combinations

from data.formats.compared import Compared, Reader, answered
from data.formats.records import BadRecord
from data.formats.score_columns import is_finite, read_numbers
from data.template import Turns


def ranked(
    value: dict, read: Reader, column: str = "responses", scores: tuple[str, ...] = (), ranks: tuple[str, ...] = ()
) -> list[Compared]:
    """Parses a list of answers. scores, ranks: keys of an answer's number; all answers must have one of them.

    Without such keys, the columns "scores" or "ranks" hold the numbers; without these, the first answer is the best.
    """
    history, items = read.history(value), answers_in(value, column)
    answers = [read.text(item) for item in items]
    if scores or ranks:
        numbers = [_numbers_in(items, scores), _numbers_in(items, ranks)]
        if numbers == [None, None]:
            raise BadRecord(f"not every answer has a number in {' or '.join(scores + ranks)}")
    else:
        numbers = [read_numbers(value, "scores"), read_numbers(value, "ranks")]
    if any(isinstance(item, dict) and item.get("custom_system_prompt") for item in items):
        read.note("with a custom_system_prompt per answer (not read, as answers to one prompt are compared)")
    return [_ranking(history, answers, *numbers, read)]


def generations(value: dict, read: Reader) -> list[Compared]:
    """Parses a list of answers in "generations", with their scores in "ratings" or "rating"."""
    scores = value["ratings" if value.get("ratings") is not None else "rating"]
    return ranked(value | {"scores": scores}, read, "generations")


def oasst(value: dict, read: Reader) -> list[Compared]:
    """Parses a tree of OpenAssistant: each question with at least two ranked replies, of which rank 0 is the best."""
    found, nodes = [], [(value["prompt"], [])]
    while nodes:
        node, history = nodes.pop()
        replies = node.get("replies") if isinstance(node, dict) else None
        if not isinstance(replies, list) or not isinstance(node.get("text"), str):
            raise BadRecord("a message of the tree is not an object with text and replies")
        turns = [*history, {"role": ("user", "assistant")[len(history) % 2], "content": node["text"]}]
        nodes += [(reply, turns) for reply in reversed(replies)]
        best = [reply for reply in replies if _numbers_in([reply], ("rank",)) and not reply.get("deleted")]
        if len(history) % 2 or len(replies) < 2:
            continue
        if len(best) < len(replies):
            read.note("with replies that have no rank or are deleted (not compared)")
        try:
            if len(best) > 1:
                texts, ranks = [read.text({"text": reply.get("text")}) for reply in best], _numbers_in(best, ("rank",))
                found.append(_ranking(turns, texts, None, ranks, read))
        except BadRecord as error:
            read.note(f"with a question of its tree left out: {error}")
    if not found:
        raise BadRecord("no question of the tree has two ranked replies")
    return found


def answers_in(value: dict, name: str) -> list:
    """Returns the list in the column `name`. Raises BadRecord unless it has at least two items."""
    if not isinstance(value[name], list) or len(value[name]) < 2:
        raise BadRecord(f"{name} is not a list of at least two answers")
    return value[name]


def _numbers_in(items: list, names: tuple[str, ...]) -> list[float] | None:
    """Returns the numbers under the first of `names` that all items have one under; None if there is no such name."""
    for name in names:
        numbers = [item.get(name) if isinstance(item, dict) else None for item in items]
        if all(map(is_finite, numbers)):
            return list(map(float, numbers))
    return None


def _ranking(
    history: Turns, answers: list[str], scores: list[float] | None, ranks: list[float] | None, read: Reader
) -> Compared:
    """Returns the answers and all pairs of different rank. Equal texts and equal ranks make no pair, and are noted.

    Larger scores are better; rank 1 is the best; without both, the first response. Raises BadRecord if no pair is left.
    """
    for name, numbers in (("scores", scores), ("ranks", ranks)):
        if numbers is not None and len(numbers) != len(answers):
            raise BadRecord(f"{len(numbers)} {name} for {len(answers)} responses")
    quality = scores or [-rank for rank in ranks or range(len(answers))]
    pairs = []
    for i, j in combinations(range(len(answers)), 2):
        better, worse = (i, j) if quality[i] > quality[j] else (j, i)
        if answers[i].strip() == answers[j].strip():
            read.note("with the same response twice (these two are not compared)")
        elif quality[i] == quality[j]:
            read.note("with two responses of the same rank (these two are not compared)")
        else:
            pairs.append((better, worse, scores[better] - scores[worse] if scores else None))
    if not pairs:
        raise BadRecord("no two responses differ in text and rank")
    dialogues = [answered(history, answer) for answer in answers]
    return Compared(dialogues[0][:-1], [turns[-1]["content"] for turns in dialogues], pairs)
