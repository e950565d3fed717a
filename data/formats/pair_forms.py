"""Parse the forms of a preference with two answers. Each function takes a record and a Reader."""

from typing import Any

from data.formats.compared import Compared, Reader, answered, pair_of
from data.formats.dialogue_forms import SYSTEM
from data.formats.ranked_answers import answers_in
from data.formats.records import BadRecord
from data.formats.score_columns import read_number
from data.formats.turns import check_turns, is_hh
from data.template import Turns


def sides(value: dict, read: Reader, better: str = "chosen", worse: str = "rejected") -> list[Compared]:
    """Parses a better and a worse answer to a prompt, or two whole dialogues."""
    try:
        prompt, problem = read.history(value), None
    except BadRecord as error:  # whole dialogues do not need it
        prompt, problem = [], error
    compared = pair_of(*(_side(value, key, value[key], prompt, problem, read) for key in (better, worse)))
    if any(turn not in compared[0].history for turn in prompt):
        read.note("with a prompt that is not part of its whole dialogues (this prompt is not read)")
    return compared


def _side(value: dict, key: str, side: Any, prompt: Turns, problem: BadRecord | None, read: Reader) -> Turns:
    """Returns the dialogue of one side of a pair, with `prompt` in front unless the side includes the history."""
    if isinstance(side, list) and len(side) == 1 and isinstance(side[0], str | dict) and (prompt or problem):
        return _side(value, key, side[0], prompt, problem, read)
    if isinstance(side, list) or (isinstance(side, str) and is_hh(side)):
        turns = _whole(side, prompt, value, read)
    elif isinstance(side, str) and prompt:
        turns = answered(prompt, side)
    elif isinstance(side, dict) and prompt:
        turns = read.turns([*prompt, side])
    else:
        raise problem or BadRecord(f"{key} is neither a dialogue nor an answer to a prompt")
    if turns[-1]["role"] != "assistant":
        raise BadRecord(f"{key} does not end in an answer of the assistant")
    return turns


def _whole(dialogue: Any, prompt: Turns, value: dict, read: Reader) -> Turns:
    """Returns a whole dialogue with the system turn of the record's columns or of the prompt, unless it has its own."""
    system = {name: value[name] for name in SYSTEM if name in value}
    key = "prompt" if isinstance(dialogue, str) else "messages"
    turns = read.turns({key: dialogue} | system if system else dialogue)
    missing = bool(prompt) and prompt[0]["role"] == "system" and turns[0]["role"] != "system"
    return check_turns([prompt[0], *turns]) if missing else turns


def swift(value: dict, read: Reader) -> list[Compared]:
    """Parses a dialogue in "messages", and another last answer to it or another whole dialogue."""
    chosen = _whole(value["messages"], [], value, read)
    key = "rejected_response" if value.get("rejected_response") is not None else "rejected_messages"
    if chosen[-1]["role"] != "assistant":
        raise BadRecord("messages does not end in an answer of the assistant")
    return pair_of(chosen, _side(value, key, value[key], chosen[:-1], None, read))


def labelled(
    value: dict, read: Reader, first: str, second: str, key: str, labels: tuple[Any, ...] = (0, 1)
) -> list[Compared]:
    """Parses two columns with answers and one with a label. labels: those of the first and the second, in turn."""
    return _two(value, read, first, second, _second_is_better(value[key], key, labels))


def signed(value: dict, read: Reader, first: str, second: str, key: str) -> list[Compared]:
    """Parses two columns with answers and one with a number, negative if the first is better; its size is the gap."""
    number = read_number(value, key)
    if not number:
        raise BadRecord(f"a tie: {key} prefers neither answer")
    return _two(value, read, first, second, number > 0, abs(number))


def _two(value: dict, read: Reader, first: str, second: str, swap: bool, gap: float | None = None) -> list[Compared]:
    history = read.history(value)
    answers = [answered(history, read.text(value[name])) for name in (first, second)]
    return pair_of(answers[swap], answers[not swap], gap)


def _second_is_better(label: Any, key: str, labels: tuple[Any, ...]) -> bool:
    label = label.strip().lower() if isinstance(label, str) else label
    if isinstance(label, str) and label.split()[:1] in (["tie"], ["both"], ["neither"]):
        raise BadRecord(f"a tie: {key} prefers neither answer")
    found = [place for place, name in enumerate(labels) if label in (name, str(name)) and not isinstance(label, bool)]
    if not found:
        raise BadRecord(f"{key} does not name one of the two answers")
    return found[0] % 2 == 1


def safe_rlhf(value: dict, read: Reader) -> list[Compared]:
    """Parses PKU-SafeRLHF: the better answer is the more helpful or the safer one, as --preferred_by says."""
    key = f"{read.options.preferred_by}_response_id"
    if value.get(key) is None:
        raise BadRecord(f"no {key}, which --preferred_by {read.options.preferred_by} reads")
    return labelled(value, read, "response_0", "response_1", key)


def webgpt(value: dict, read: Reader) -> list[Compared]:
    """Parses a question, two answers and their scores. The quotes that the answers cite are not read."""
    question, scores = value.get("question"), [read_number(value, name) for name in ("score_0", "score_1")]
    if None in scores or scores[0] == scores[1]:
        raise BadRecord("an answer without a score" if None in scores else "a tie: score_0 and score_1 are equal")
    prompt = question.get("full_text") if isinstance(question, dict) else question
    swap = scores[1] > scores[0]
    return _two(value | {"prompt": prompt}, read, "answer_0", "answer_1", swap, abs(scores[1] - scores[0]))


def shp(value: dict, read: Reader) -> list[Compared]:
    """Parses Stanford's human preferences: "history" is the text of a post; label 1 means that A is better."""
    return labelled(value | {"prompt": value["history"]}, read, "human_ref_A", "human_ref_B", "labels", (1, 0))


def summaries(value: dict, read: Reader) -> list[Compared]:
    """Parses summarize_from_feedback comparisons. The prompt is a post or an article, and "TL;DR:"."""
    info, both = value["info"], answers_in(value, "summaries")
    if not isinstance(info, dict) or len(both) != 2:
        raise BadRecord("info is not an object, or there are more than two summaries")
    parts = [("SUBREDDIT: r/", "subreddit"), ("TITLE: ", "title"), ("POST: ", "post"), ("Article:\n\n", "article")]
    found = {key: start + info[key] for start, key in parts if isinstance(info.get(key), str) and info[key].strip()}
    if "post" in found:
        found.pop("article", None)
    elif "article" in found:
        found = {"article": found["article"]}
    else:
        raise BadRecord("info has neither a post nor an article")
    prompt = [{"role": "user", "content": "\n\n".join([*found.values(), "TL;DR:"])}]
    return labelled({"prompt": prompt, "0": both[0], "1": both[1], **value}, read, "0", "1", "choice")


def arena_conversations(value: dict, read: Reader) -> list[Compared]:
    """Parses two whole conversations of Chatbot Arena. Those of several turns have different histories."""
    both = [read.turns(value[name]) for name in ("conversation_a", "conversation_b")]
    if any(turns[-1]["role"] != "assistant" for turns in both):
        raise BadRecord("a conversation does not end in an answer of the assistant")
    swap = _second_is_better(value["winner"], "winner", ("model_a", "model_b", "a", "b"))
    return pair_of(both[swap], both[not swap])


def arena_answers(value: dict, read: Reader) -> list[Compared]:
    """Parses response_a and response_b with a "winner", or with 1 in winner_model_a, winner_model_b or winner_tie."""
    winners = [name for name in ("model_a", "model_b", "tie") if value.get(f"winner_{name}") in (1, "1")]
    value = {"winner": winners[0] if len(winners) == 1 else None} | value
    return labelled(value, read, "response_a", "response_b", "winner", ("model_a", "model_b", "a", "b"))
