"""What all forms of a preference share: how the history and the answers of a record are read and compared."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data.formats.columns import FormOptions
from data.formats.dialogue_forms import INPUTS, SYSTEM, parse_turns
from data.formats.records import BadRecord
from data.formats.turns import ROLES, check_turns
from data.template import Turns

QUESTIONS = (
    "prompt", "conversations", "messages", "instruction", "question", "query", "context", "trajectory", "input",
)  # fmt: skip
BESIDE = ("history", *SYSTEM, *INPUTS, "passage", "choices", "options")  # columns that belong to the question
TEXTS = ("content", "value", "text", "answer", "response")  # keys of the text in an answer that is an object


@dataclass(frozen=True)
class Compared:
    """Answers to one history, and (better index, worse index, score gap or None) per pair of them."""

    history: Turns
    answers: list[str]
    pairs: list[tuple[int, int, float | None]]


@dataclass(frozen=True)
class Reader:
    """What the flags say about forms, and `note`, which takes a reason and counts it once per record."""

    options: FormOptions
    note: Callable[[str], Any]

    def turns(self, value: Any) -> Turns:
        """Returns the turns of a dialogue or of a prompt, in any form of `parse_turns`."""
        return parse_turns(value, options=self.options, note=self.note)

    def text(self, answer: Any) -> str:
        """Returns the text of an answer: text, a message, an object with its text, or a list of one of them."""
        if isinstance(answer, list) and len(answer) == 1:
            answer = answer[0]
        if isinstance(answer, dict):
            role = answer.get("role", answer.get("from"))
            if role is None:
                answer = next((answer[key] for key in TEXTS if answer.get(key) is not None), None)
            elif isinstance(role, str) and ROLES.get(role.lower()) == "assistant":
                answer = self.turns([{"role": "user", "content": "?"}, answer])[-1]["content"]
        if not isinstance(answer, str):
            raise BadRecord("a response is neither text nor a message of the assistant")
        return answer

    def history(self, value: dict) -> Turns:
        """Returns the turns before the answers, from the first of QUESTIONS that the record has; [] without one."""
        key = next((key for key in QUESTIONS if value.get(key) not in (None, [])), None)
        if key is None:
            return []
        beside = {name: value[name] for name in BESIDE if name in value and name != key}
        if not isinstance(beside.get("history"), list) or not isinstance(value[key], str):
            beside.pop("history", None)
        return self.turns({"instruction" if key == "instruction" else "prompt": value[key]} | beside)


def answered(history: Turns, answer: str) -> Turns:
    """Returns the checked turns of a history and an answer."""
    return check_turns([*history, {"role": "assistant", "content": answer}])


def pair_of(chosen: Turns, rejected: Turns, gap: float | None = None) -> list[Compared]:
    """Returns the pair of two dialogues. Raises BadRecord unless they differ in the last answer, and in it only."""
    if chosen[:-1] != rejected[:-1]:
        raise BadRecord("the histories of chosen and rejected differ")
    if chosen[-1] == rejected[-1]:
        raise BadRecord("chosen and rejected are the same answer")
    return [Compared(chosen[:-1], [chosen[-1]["content"], rejected[-1]["content"]], [(0, 1, gap)])]
