"""Packages that only some flags and files need."""

import importlib.util

from utils.errors import UserError


def check_peft(what: str) -> None:
    """Raises UserError if peft is not installed. what: the flag, or flag and folder, that needs it."""
    if importlib.util.find_spec("peft") is None:
        raise UserError(f"{what}: peft is not installed; run pip install peft==0.21.2")
