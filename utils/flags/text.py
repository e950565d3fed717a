"""The flags about text that every command shares: template, its arguments, the end of an answer. No torch."""

import json
from dataclasses import dataclass, field
from typing import Literal

from utils.errors import UserError


@dataclass
class TextFlags:
    """How a dialogue becomes tokens."""

    lang: Literal["en", "zh"] = "en"
    """Which template a tokenizer without a chat template gets: en: moss_en, zh: moss_zh"""
    template: Literal["auto", "moss_en", "moss_zh", "chat"] = "auto"
    """How a dialogue becomes tokens. auto: the tokenizer's own chat template, or by --lang where it has none"""
    chat_template_kwargs: str = "{}"
    """Arguments of the chat template, as a JSON object: '{"enable_thinking": false}'"""

    def __post_init__(self) -> None:
        """Checks; classes with some of their own call the next one's."""
        _ = self.template_arguments

    @property
    def template_arguments(self) -> dict:
        """--chat_template_kwargs as a dict. Raises UserError when it is no JSON object."""
        try:
            arguments = json.loads(self.chat_template_kwargs)
        except ValueError as error:
            arguments = error
        if not isinstance(arguments, dict):
            reason = arguments if isinstance(arguments, ValueError) else f"it is of type {type(arguments).__name__}"
            raise UserError(
                f"--chat_template_kwargs {self.chat_template_kwargs}: not a JSON object ({reason}); give one such as "
                "'{\"enable_thinking\": false}'"
            )
        return arguments


@dataclass
class StopFlags:
    """Where an answer ends, for commands that generate."""

    stop_token: list[str] = field(default_factory=list)
    """Tokens that end an answer, in place of those found: the end of the template's turns, EOS and those of
    generation_config.json"""
