"""Flags about text that every command shares: template, its arguments, end of an answer. No torch."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from utils.errors import UserError
from utils.files import parse_json
from utils.flags.checks import check_required
from utils.flags.fields import Common


@dataclass
class TextFlags:
    """Text: how a dialogue becomes tokens."""

    required: ClassVar[tuple[str, ...]] = ()  # flags that must have a value
    hint: ClassVar[str] = "see --help"  # for a command line without flags
    given: ClassVar[frozenset[str]] = frozenset()  # flags that the user gave; `parse_args` sets it
    replaced_defaults: ClassVar[dict] = {}  # flag -> default, where `replace_default` chose another value

    lang: Literal["en", "zh"] = "en"
    """Template for a tokenizer without a chat template: moss_en for en, moss_zh for zh"""
    template: Common[Literal["auto", "moss_en", "moss_zh", "chat"]] = "auto"
    """Template that turns a dialogue into tokens. auto: the tokenizer's chat template, or that of --lang without one"""
    chat_template_kwargs: str = "{}"
    """Arguments of the chat template, as a JSON object: '{"enable_thinking": false}'"""

    def __post_init__(self) -> None:
        """Checks values. The last in the chain of `super()`: classes with checks of their own stand before this one."""
        check_required(self)
        _ = self.template_arguments

    @property
    def template_arguments(self) -> dict:
        """--chat_template_kwargs as a dict. Raises UserError if it is not a JSON object."""
        try:
            arguments = parse_json(self.chat_template_kwargs)
        except ValueError as error:
            arguments = error
        if not isinstance(arguments, dict):
            reason = arguments if isinstance(arguments, ValueError) else f"it is of type {type(arguments).__name__}"
            raise UserError(
                f"--chat_template_kwargs {self.chat_template_kwargs}: not a JSON object ({reason}); pass one such as "
                "'{\"enable_thinking\": false}'"
            )
        return arguments


@dataclass
class StopFlags:
    """Sampling: where an answer ends."""

    stop_token: list[str] = field(default_factory=list)
    """Tokens that end an answer. Default: EOS, the end of the template's turns and those of generation_config.json"""
