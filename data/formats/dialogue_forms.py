"""Parse the common dialogue formats into one: [{"role": "user" | "assistant" | "system", "content": str}, …]."""

import re
from collections.abc import Callable
from typing import Any

from data.formats.columns import PLAIN, FormOptions
from data.formats.records import BadRecord
from data.template import Turns
from utils.terminal import has_lone_surrogate

_ROLES = {
    "user": "user", "human": "user", "prompter": "user", "assistant": "assistant", "gpt": "assistant",
    "bot": "assistant", "model": "assistant", "system": "system",
}  # fmt: skip
_HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def ignore(reason: str) -> None:
    """Does not count `reason`."""


def parse_turns(
    value: Any, empty_answer: bool = False, options: FormOptions = PLAIN, note: Callable[[str], Any] = ignore
) -> Turns:
    """Returns the turns of a dialogue record, checked by `check_turns`. Raises BadRecord with the reason.

    Formats: a list of strings (human first) or of messages; {"messages"}; {"conversations"} (ShareGPT); {"instruction",
    "input", "output"} (Alpaca); {"prompt"} and {"prompt", "response"}, where the prompt is a list as above or text,
    plain or in Anthropic's format ("\\n\\nHuman: … \\n\\nAssistant: …"). A text in "system" becomes the system turn.
    """
    if isinstance(value, list):
        return check_turns(_from_list(value), empty_answer)
    if not isinstance(value, dict):
        raise BadRecord(f"neither a list nor an object but {_kind(value)}")
    for key in ("messages", "conversations"):
        if key in value:
            return check_turns(with_system(_from_list(_expect(value, key, list)), value), empty_answer)
    if "instruction" in value:
        return check_turns(with_system(_from_alpaca(value), value), empty_answer)
    if "prompt" not in value:
        raise BadRecord("none of the keys messages, conversations, instruction, prompt")
    turns = parse_history(value["prompt"])
    if value.get("response") is not None:
        turns = [*turns, {"role": "assistant", "content": _expect(value, "response", str)}]
    return check_turns(with_system(turns, value), empty_answer)


def with_system(turns: Turns, record: dict) -> Turns:
    """Returns the turns with the text of the record's column "system" in front, unless they have a system turn."""
    text = record.get("system")
    if not isinstance(text, str) or not text.strip() or any(turn["role"] == "system" for turn in turns):
        return turns
    return [{"role": "system", "content": text}, *turns]


def parse_history(prompt: Any) -> Turns:
    """Returns the turns of a prompt given as a list or as text, without checking them."""
    if isinstance(prompt, list):
        return _from_list(prompt)
    if not isinstance(prompt, str):
        raise BadRecord(f"prompt is {_kind(prompt)}, not text or a list")
    return from_hh(prompt) if is_hh(prompt) else [{"role": "user", "content": prompt}]


def is_hh(text: str) -> bool:
    """Returns whether `text` is a dialogue in Anthropic's HH format."""
    return text.lstrip().startswith("Human:")


def from_hh(text: str) -> Turns:
    """Returns the turns of "\\n\\nHuman: … \\n\\nAssistant: …". An empty "Assistant:" at the end is dropped."""
    parts = _HH_TURN.split(text.strip())
    if parts[0].strip():
        raise BadRecord("text does not begin with 'Human:'")
    turns = [
        {"role": _ROLES[role.lower()], "content": content}
        for role, content in zip(parts[1::2], parts[2::2], strict=True)
    ]
    if turns and turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip():
        turns.pop()
    return turns


def check_turns(turns: Turns, empty_answer: bool = False) -> Turns:
    """Returns the turns with surrounding white space removed. Raises BadRecord if they cannot be encoded.

    Valid turns: an optional system turn, then human and assistant alternately; none is empty. empty_answer: allow an
    empty last answer, which models sometimes generate.
    """
    turns = [{"role": turn["role"], "content": turn["content"].strip()} for turn in turns]
    spoken = turns[1:] if turns and turns[0]["role"] == "system" else turns
    if not spoken:
        raise BadRecord("no human turn")
    for k, turn in enumerate(spoken):
        if turn["role"] != ("user", "assistant")[k % 2]:
            raise BadRecord(_order_error(k, turn["role"]))
    for k, turn in enumerate(turns, start=1):
        if not turn["content"] and not (empty_answer and k == len(turns) and turn["role"] == "assistant"):
            raise BadRecord("an empty turn")
        if has_lone_surrogate(turn["content"]):
            raise BadRecord("a lone surrogate in the text")
    return turns


def _order_error(place: int, role: str) -> str:
    if role == "system":
        return "a system turn that is not the first"
    who = {"user": "human", "assistant": "assistant"}[role]
    return f"the {who} speaks first" if place == 0 else f"two turns of the {who} in a row"


def _from_list(items: list) -> Turns:
    if items and all(isinstance(item, str) for item in items):
        return [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(items)]
    turns = []
    for item in items:
        if isinstance(item, str):
            raise BadRecord("a list of texts and of other things")
        if not isinstance(item, dict):
            raise BadRecord(f"a turn is {_kind(item)}")
        role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
        if not isinstance(role, str) or role.lower() not in _ROLES:
            raise BadRecord("a turn of neither user, assistant nor system")
        if not isinstance(content, str):
            raise BadRecord(f"the content of a turn is {_kind(content)}, not text")
        turns.append({"role": _ROLES[role.lower()], "content": content})
    return turns


def _from_alpaca(value: dict) -> Turns:
    question = _expect(value, "instruction", str)
    if value.get("input"):
        question = f"{question}\n\n{_expect(value, 'input', str)}"
    turns = [{"role": "user", "content": question}]
    if value.get("output") is not None:
        turns.append({"role": "assistant", "content": _expect(value, "output", str)})
    return turns


def _expect(value: dict, key: str, kind: type) -> Any:
    if not isinstance(value[key], kind):
        raise BadRecord(f"{key} is {_kind(value[key])}, not {'text' if kind is str else 'a list'}")
    return value[key]


def _kind(value: Any) -> str:
    names = {str: "text", int: "a number", float: "a number", bool: "true/false", list: "a list", dict: "an object"}
    return names.get(type(value), "null")
