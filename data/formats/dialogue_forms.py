"""The published forms of a dialogue, one row per form. Turns: [{"role": "user" | "assistant" | "system", "content"}, …]

What the columns of a record are read as is in docs/data.md, with an example of each form.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data.formats.columns import PLAIN, FormOptions, first_key, map_columns, named_columns
from data.formats.nearest import nearest, shown_name
from data.formats.records import UNREAD, BadRecord
from data.formats.turns import (
    Note,
    check_turns,
    expect,
    from_list,
    from_prompt,
    ignore,
    kind_of,
    refuse_media,
    refuse_tools,
    with_reasoning,
)  # fmt: skip
from data.template import Turns

ANSWERS = ("response", "completion", "output", "answer", "solution", "target", "targets", "assistant")
SYSTEM = ("system", "system_prompt")
INPUTS = ("input", "context")  # of an instruction
_BESIDE = ("input", "context", "passage", "choices", "options")  # of any other question: not read


def _is_any(value: Any) -> bool:
    return True


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _is_question(value: Any) -> bool:
    return isinstance(value, str) or _is_messages(value)


def _is_tree(value: Any) -> bool:
    return isinstance(value, dict) and "replies" in value


@dataclass(frozen=True)
class Form:
    """One form of a dialogue.

    columns: one of them holds the question, or the whole dialogue if there are no `answers`. answers: columns with the
    answer to the question, the likely ones first. accepts: whether a value of the column is of this form.
    """

    name: str
    columns: tuple[str, ...]
    answers: tuple[str, ...] = ()
    accepts: Callable[[Any], bool] = _is_question

    @property
    def asks(self) -> bool:
        """Whether its column holds a question only, text or a list."""
        return bool(self.answers) or self.accepts is _is_question


FORMS = (
    Form("messages", ("messages",), (), _is_any),
    Form("ShareGPT", ("conversations",), (), _is_any),
    Form("conversation", ("conversation", "dialog", "dialogue"), (), _is_list),
    Form("OASST tree", ("prompt",), (), _is_tree),
    Form("Alpaca", ("instruction",), ("output", "response"), _is_any),
    Form("prompt and response", ("prompt",), ("response", "completion"), _is_any),
    Form("question and answer", ("question",), ("answer", "response")),
    Form("query and response", ("query",), ("response", "answer")),
    Form("problem and solution", ("problem",), ("solution", "answer")),
    Form("input and output", ("input", "inputs"), ("output", "target", "targets")),
    Form("user and assistant", ("user", "human"), ("assistant", "bot", "gpt")),
    Form("UltraChat", ("data",), (), _is_list),
    Form("turns", ("turns", "chat", "items"), (), _is_messages),  # a list of texts is one of questions in MT-Bench
    Form("text", ("text",)),
)
COLUMN = Form("single column", ())  # of any other name
# What `nearest` compares a record of no form with; the first of equally near forms counts.
_NEEDS = [
    (form.name, ("|".join(form.columns), "|".join(form.answers)) if form.answers else ("|".join(form.columns),))
    for form in sorted(FORMS, key=lambda form: form.name != "prompt and response")
    if form.accepts is not _is_tree and form.name != "text"
]


def parse_turns(
    value: Any, empty_answer: bool = False, options: FormOptions = PLAIN, note: Note = ignore
) -> Turns:  # fmt: skip
    """Returns the turns of a dialogue record in any form of FORMS, checked by `check_turns`. Raises BadRecord.

    A list is one of strings (human first) or of messages; a text is a question, or a dialogue in Anthropic's format
    ("\\n\\nHuman: … \\n\\nAssistant: …"). note: takes each reason to count the record for: what is changed or not read.
    """
    value = map_columns(value, options)
    asked, form, used = read_question(value, options, note)
    if form is not None:
        answer, key = _answer_of(value, form, options, note)
        asked, used = asked + answer, used | {key} | named_columns(options) | set(_BESIDE if form.asks else ())
    turns = check_turns(asked, empty_answer)
    for key in value if form is not None else ():
        if key not in used and value[key] not in (None, "", [], {}):
            note(UNREAD + shown_name(key))
    return turns


def parse_dialogue(value: Any, options: FormOptions = PLAIN, note: Note = ignore) -> Turns:
    """Returns turns that end in an answer; a last question without one is cut off and noted. Raises BadRecord."""
    notes: list[str] = []
    turns = parse_turns(value, options=options, note=notes.append)
    if not any(turn["role"] == "assistant" for turn in turns):
        value = map_columns(value, options)
        asks = isinstance(value, dict) and form_of(value, options)[0].asks
        raise BadRecord("no answer of the assistant" + (nearest(value, _NEEDS) if asks else ""))
    for reason in notes:
        note(reason)
    if turns[-1]["role"] == "user":
        turns = turns[:-1]
        note("ended in a question without an answer, which was cut off")
    return turns


def form_of(value: dict, options: FormOptions = PLAIN) -> tuple[Form, str] | None:
    """Returns the form of a record after `map_columns`, and its column with the question or dialogue; or None.

    The first form of FORMS counts that the record has a column of; columns that the flags fill come before all others.
    """
    mapped = options.mapped()
    found = [(form, column) for form in FORMS for column in form.columns if column in value]
    found.sort(key=lambda one: one[1] not in mapped)
    for form, column in found:
        if value[column] is not None and form.accepts(value[column]):
            return form, column
    only = next(iter(value)) if len(value) == 1 and not found else None
    if only is not None and only not in ANSWERS and isinstance(value[only], str):
        return COLUMN, only
    return next(((form, column) for form, column in found if form.accepts is _is_any), None)


def read_question(
    value: Any, options: FormOptions = PLAIN, note: Note = ignore, needs: int = 2
) -> tuple[Turns, Form | None, set[str]]:  # fmt: skip
    """Returns (turns, form, columns that were read) of a record after `map_columns`, without an answer column.

    The turns are not checked. The form is None if the record is a list or a text. Raises BadRecord, which names the
    nearest form: of those with question and answer (needs 2), or with a question (1).
    """
    if isinstance(value, list | str):
        return from_prompt(value, options, note), None, set()
    if not isinstance(value, dict):
        raise BadRecord(f"neither a list nor an object but {kind_of(value)}")
    found = form_of(value, options)
    if found is None:
        raise BadRecord("none of the known forms" + nearest(value, [(name, both[:needs]) for name, both in _NEEDS]))
    form, column = found
    turns, beside = _question_in(value, form, column, options, note)
    if form.answers and value.get("history"):
        turns = _history_of(value, options, note) + turns
    return _with_system(turns, value, note), form, {column, *beside, *SYSTEM}


def _question_in(
    value: dict, form: Form, column: str, options: FormOptions, note: Note
) -> tuple[Turns, tuple[str, ...]]:  # fmt: skip
    """Returns the turns of a record's column, and the other columns that were read."""
    refuse_media(value)
    if form.name == "Alpaca":
        return _from_alpaca(value), (*INPUTS, "history")
    if form.accepts is _is_tree:
        return _from_tree(value[column]), ()
    if not form.asks:
        refuse_tools(value)
        return from_list(expect(value, column, list), options, note), ()
    for key in () if options.prompt_template else _BESIDE:
        if key != column and value.get(key):
            note(f"with the column {key}, which is not part of the prompt; --prompt_template can put it there")
    return from_prompt(value[column], options, note), ("history",) if form.answers else ()


def _from_alpaca(value: dict) -> Turns:
    question, key = expect(value, "instruction", str), next((key for key in INPUTS if value.get(key)), None)
    if key:
        question = f"{question}\n\n{expect(value, key, str)}"
    return [{"role": "user", "content": question}]


def _from_tree(node: dict) -> Turns:
    """Returns the path through a tree of OpenAssistant that takes the reply of the best (lowest) rank each time."""
    turns: Turns = []
    while node:
        text, replies = node.get("text"), node.get("replies") or []
        if not isinstance(text, str) or not isinstance(replies, list) or not all(isinstance(r, dict) for r in replies):
            raise BadRecord("a message of the tree is not an object with text and replies")
        turns.append({"role": ("user", "assistant")[len(turns) % 2], "content": text})
        kept = [reply for reply in replies if not reply.get("deleted")]
        ranks = [reply["rank"] if type(reply.get("rank")) in (int, float) else float("inf") for reply in kept]
        node = kept[ranks.index(min(ranks))] if kept else {}
    return turns


def _history_of(value: dict, options: FormOptions, note: Note) -> Turns:
    """Returns the turns of the column "history": pairs of a question and its answer, or a list as of any dialogue."""
    items = expect(value, "history", list)
    if all(isinstance(item, list) for item in items):
        if any(len(item) != 2 or not all(isinstance(text, str) for text in item) for item in items):
            raise BadRecord("history is not a list of pairs of a question and an answer")
        items = [text for item in items for text in item]
    return from_list(items, options, note)


def _with_system(turns: Turns, record: dict, note: Note) -> Turns:
    """Returns the turns with the text of the record's column "system" in front, unless they have a system turn."""
    key = next((key for key in SYSTEM if record.get(key)), None)
    if key is None or not expect(record, key, str).strip():
        return turns
    if any(turn["role"] == "system" for turn in turns):
        if turns[0]["content"].strip() != record[key].strip():
            note(f"with the column {key}, which is not read, as the dialogue has a system turn")
        return turns
    return [{"role": "system", "content": record[key]}, *turns]


def _answer_of(value: dict, form: Form, options: FormOptions, note: Note) -> tuple[Turns, str | None]:
    """Returns the turns of the answer, and the column that it is in; [] and None without one."""
    names = [*form.answers, *ANSWERS] if form.answers else []
    mapped = options.mapped()
    key = first_key(value, sorted(names, key=lambda name: name not in mapped))
    if key is None:
        return [], None
    if isinstance(value[key], list) and value[key] and all(isinstance(item, dict) for item in value[key]):
        return from_list(value[key], options, note), key
    answer = expect(value, key, str)
    reasoning = {name: item for name, item in value.items() if isinstance(item, str)}
    return [{"role": "assistant", "content": with_reasoning(answer, reasoning, options, note)}], key
