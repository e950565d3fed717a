"""Packages that only some flags and files need."""

import importlib.util

from utils.errors import UserError


def check_peft(what: str) -> None:
    """Raises UserError if peft is not installed. what: the flag, or flag and folder, that needs it."""
    _check("peft", "0.21.2", what)


def check_openai(what: str) -> None:
    """Raises UserError if the `openai` client is not installed."""
    _check("openai", "3.57.0", what)


def _check(package: str, version: str, what: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{what}: {package} is not installed; run pip install {package}=={version}")
