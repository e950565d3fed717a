"""Turns from lists of texts or messages and from Anthropic's text format, and their checks."""

import re
from collections.abc import Callable
from typing import Any

from data.formats.columns import PLAIN, FormOptions, first_key
from data.formats.records import BadRecord
from data.template import Turns
from utils.terminal import has_lone_surrogate

ROLES = {
    "user": "user", "human": "user", "prompter": "user", "assistant": "assistant", "gpt": "assistant",
    "bot": "assistant", "model": "assistant", "chatbot": "assistant", "chatgpt": "assistant", "system": "system",
    "developer": "system",
}  # fmt: skip
_TOOL_ROLES = {"tool", "tool_call", "tool_response", "function", "function_call", "observation", "ipython"}
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
_TOOL_KEYS = ("tool_calls", "function_call", "tools", "functions")
_ROLE_KEYS, _TEXT_KEYS = ("role", "from", "speaker"), ("content", "value", "text")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_TRAIN_KEYS = ("weight", "train", "loss")  # of OpenAI, Axolotl, ms-swift
_HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_MARKED_TURN = re.compile(r"### (Human|Assistant):")
Note = Callable[[str], Any]


def ignore(reason: str) -> None:
    """Does not count `reason`."""


def is_hh(text: str) -> bool:
    """Returns whether `text` is a dialogue in Anthropic's HH format, or in Guanaco's with "### Human:"."""
    return text.lstrip().startswith(("Human:", "### Human:"))


def from_hh(text: str) -> Turns:
    """Returns the turns of "\\n\\nHuman: … \\n\\nAssistant: …". An empty "Assistant:" at the end is dropped."""
    text = text.strip()
    parts = (_MARKED_TURN if text.startswith("### ") else _HH_TURN).split(text)
    if parts[0].strip():
        raise BadRecord("text does not begin with 'Human:'")
    turns = [
        {"role": ROLES[role.lower()], "content": content}
        for role, content in zip(parts[1::2], parts[2::2], strict=True)
    ]
    if turns and turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip():
        turns.pop()
    return turns


def from_prompt(prompt: Any, options: FormOptions = PLAIN, note: Note = ignore) -> Turns:
    """Returns the turns of a prompt given as a list or as text, without checking them."""
    if isinstance(prompt, list):
        return from_list(prompt, options, note)
    if not isinstance(prompt, str):
        raise BadRecord(f"prompt is {kind_of(prompt)}, not text or a list")
    return from_hh(prompt) if is_hh(prompt) else [{"role": "user", "content": prompt}]


def from_list(items: list, options: FormOptions = PLAIN, note: Note = ignore) -> Turns:
    """Returns the turns of a list of texts, human first, or of messages, without checking their order."""
    if items and all(isinstance(item, str) for item in items):
        return [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(items)]
    turns: Turns = []
    for item in items:
        if isinstance(item, str):
            raise BadRecord("a list of texts and of other things")
        if not isinstance(item, dict):
            raise BadRecord(f"a turn is {kind_of(item)}")
        turns += _from_message(item, options, note)
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


def with_reasoning(answer: str, record: dict, options: FormOptions, note: Note) -> str:
    """Returns an answer with the record's reasoning in front, in the form of chat templates, unless a flag drops it."""
    key = first_key(record, _REASONING)
    if key is None or not expect(record, key, str).strip():
        return answer
    if options.reasoning == "drop":
        note(f"with {key}, which --reasoning drop leaves out")
        return answer
    if answer.lstrip().startswith("<think>"):
        note(f"with {key} that is not read, as the answer begins with <think>")
        return answer
    note(f"with {key}, put before its answer as <think>")
    return f"<think>\n{record[key].strip()}\n</think>\n\n{answer}"


def expect(value: dict, key: str, kind: type) -> Any:
    """Returns `value[key]`. Raises BadRecord unless it is of the kind, text or a list."""
    if not isinstance(value[key], kind):
        raise BadRecord(f"{key} is {kind_of(value[key])}, not {'text' if kind is str else 'a list'}")
    return value[key]


def kind_of(value: Any) -> str:
    """Returns what a JSON value is, in words."""
    names = {str: "text", int: "a number", float: "a number", bool: "true/false", list: "a list", dict: "an object"}
    return names.get(type(value), "null")


def refuse_media(value: dict) -> None:
    """Raises BadRecord for a record with pictures, sound or films."""
    key = next((key for key in _MEDIA if isinstance(value.get(key), list | dict) and value[key]), None)
    if key:
        raise BadRecord(f"{key}: only text is supported")


def refuse_tools(value: dict) -> None:
    """Raises BadRecord for a message or a dialogue with calls or definitions of tools."""
    key = next((key for key in _TOOL_KEYS if value.get(key) and value[key] != "[]"), None)
    if key:
        raise BadRecord(f"{key}: tool calls are not supported")


def _from_message(item: dict, options: FormOptions, note: Note) -> Turns:
    """Returns the turn of a message; of {"input", "output"} both turns, and a system turn if it has one."""
    refuse_tools(item)
    role = item.get(first_key(item, _ROLE_KEYS))
    if role is None and isinstance(item.get("input"), str) and isinstance(item.get("output"), str):
        texts = [("system", item.get("system") or ""), ("user", item["input"]), ("assistant", item["output"])]
        return [{"role": role, "content": text} for role, text in texts[not texts[0][1] :]]
    name = role.lower() if isinstance(role, str) else None
    if name in _TOOL_ROLES:
        raise BadRecord(f"a turn of neither user, assistant nor system but of the role {name} (tool calls)")
    if name not in ROLES:
        raise BadRecord("a turn of neither user, assistant nor system")
    content = item.get(first_key(item, _TEXT_KEYS))
    if isinstance(content, list):
        content = "\n".join(map(_text_of_part, content))
    elif content is None and ROLES[name] == "assistant" and first_key(item, _REASONING):
        content = ""
    if not isinstance(content, str):
        raise BadRecord(f"the content of a turn is {kind_of(content)}, not text")
    if ROLES[name] == "assistant":
        content = with_reasoning(content, item, options, note)
        marks = [key for key in _TRAIN_KEYS if isinstance(item.get(key), bool | int) and not item[key]]
        if marks:
            note(f"with {marks[0]} = {item[marks[0]]} on an answer, which is not read: it is trained on all the same")
    return [{"role": ROLES[name], "content": content}]


def _text_of_part(part: Any) -> str:
    """Returns the text of one part of a message's content: text, or {"type": "text", "text"}."""
    text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
    if isinstance(text, str):
        return text
    kind = part.get("type") if isinstance(part, dict) else None
    what = f"of the type {kind[:20]!a}" if isinstance(kind, str) else kind_of(part)
    raise BadRecord(f"a part of a turn's content is {what}, not text")


def _order_error(place: int, role: str) -> str:
    if role == "system":
        return "a system turn that is not the first"
    who = {"user": "human", "assistant": "assistant"}[role]
    return f"the {who} speaks first" if place == 0 else f"two turns of the {who} in a row"
