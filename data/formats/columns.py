"""What the flags say about the form of records."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FormOptions:
    """Values of --columns, --prompt_template, --preferred_by and --reasoning."""

    columns: tuple[tuple[str, str], ...] = ()
    prompt_template: str = ""
    preferred_by: str = "better"
    reasoning: str = "keep"


PLAIN = FormOptions()
