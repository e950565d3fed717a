"""Parse a record of any form as a prompt: turns that end in a question, and the columns for a reward function."""

from dataclasses import replace
from typing import Any

from data.formats.columns import PLAIN, FormOptions, first_key, map_columns
from data.formats.compared import QUESTIONS, Reader
from data.formats.dialogue_forms import ANSWERS, SYSTEM, form_of, read_question
from data.formats.preference_forms import form_of as preference_form_of
from data.formats.turns import Note, check_turns, ignore
from data.template import Turns


def parse_prompt(value: Any, options: FormOptions = PLAIN, note: Note = ignore) -> tuple[Turns, dict[str, Any]]:
    """Returns (turns that end in a question, the columns of the record that do not hold the prompt).

    Forms: all of dialogue_forms.py and preference_forms.py. An answer at the end is cut off, and noted. Columns that
    --prompt_template names are among the columns. Raises BadRecord.
    """
    value = map_columns(value, options)
    preference = isinstance(value, dict) and form_of(value, options) is None and preference_form_of(value)
    if preference:
        reader = Reader(replace(options, columns=(), prompt_template=""), note)
        turns, used, answered = preference.parse(value, reader)[0].history, {*QUESTIONS, "history", *SYSTEM}, False
    else:
        turns, form, used = read_question(value, options, note, needs=1)
        answer = value.get(first_key(value, (*form.answers, *ANSWERS))) if form and form.answers else None
        answered = isinstance(answer, str) and bool(answer.strip())
    turns = check_turns(turns)
    if turns[-1]["role"] == "assistant":
        turns, answered = turns[:-1], True
    if answered:
        note("ended in the assistant's answer, which was cut off")
    columns = value.items() if isinstance(value, dict) else ()
    return turns, {key: item for key, item in columns if key not in used}
