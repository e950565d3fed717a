"""Parse a record of any form as a prompt: turns that end in a question, and the columns for a reward function."""

from collections.abc import Callable
from typing import Any

from data.formats.columns import PLAIN, FormOptions
from data.formats.dialogue_forms import ignore, parse_turns
from data.template import Turns


def parse_prompt(
    value: Any, options: FormOptions = PLAIN, note: Callable[[str], Any] = ignore
) -> tuple[Turns, dict[str, Any]]:
    """Returns (turns that end in a question, the columns of the record that do not hold the prompt).

    Raises BadRecord with the reason. note: takes a reason for which the record is counted, as it is changed.
    """
    turns = parse_turns(value, options=options, note=note)
    if turns[-1]["role"] == "assistant":
        turns = turns[:-1]
        note("ended in the assistant's answer, which was cut off")
    return turns, {}
