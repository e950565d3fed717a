"""Numeric columns of preference records: margins, and scores written by reward models."""

import sys
from typing import Any

from data.formats.records import BadRecord

STRENGTH, DEVIATION = "mean preference difference", "std preference difference"
CHOSEN_SCORES, REJECTED_SCORES = "chosen score list", "rejected score list"
SCORES_OF_SIDES = [
    ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
]  # fmt: skip
SCORE_COLUMNS = {STRENGTH, DEVIATION, CHOSEN_SCORES, REJECTED_SCORES}.union(*SCORES_OF_SIDES)


def read_number(value: dict, name: str) -> float | None:
    """Returns the number in the column `name`, or None without one. Raises BadRecord for anything else."""
    number = _column(value, name)
    return None if number is None else _finite(number, name)


def read_numbers(value: dict, name: str) -> list[float] | None:
    """Returns the list of numbers in the column `name`, or None without one. Raises BadRecord for anything else."""
    numbers = _column(value, name)
    if numbers is None:
        return None
    if not isinstance(numbers, list) or not numbers:
        raise BadRecord(f"{name} is not a list of numbers")
    return [_finite(number, f"an item of {name}") for number in numbers]


def read_strength(value: dict) -> float | None:
    """Returns the mean score difference over an ensemble (Part II §2), from its column or from both score lists."""
    strength = read_number(value, STRENGTH)
    chosen, rejected = read_numbers(value, CHOSEN_SCORES), read_numbers(value, REJECTED_SCORES)
    if strength is not None or chosen is None or rejected is None:
        return strength
    if len(chosen) != len(rejected):
        raise BadRecord(f"{CHOSEN_SCORES} and {REJECTED_SCORES} have different lengths")
    return (sum(chosen) - sum(rejected)) / len(chosen)


def read_score_gap(value: dict) -> float | None:
    """Returns the difference of the scores of the better and the worse answer, from the first two columns with them."""
    scores = ([read_number(value, name) for name in names] for names in SCORES_OF_SIDES)
    return next((chosen - rejected for chosen, rejected in scores if chosen is not None and rejected is not None), None)


def is_finite(value: Any) -> bool:
    """Returns whether the value is a number that a float can represent. JSON integers can have hundreds of digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max  # False for NaN


def _column(value: dict, name: str) -> Any:
    """Returns the value of a column whose name may have spaces or underscores; None if there is none."""
    spellings = (name, name.replace(" ", "_"), name.replace("_", " "))
    return next((value[key] for key in spellings if value.get(key) is not None), None)


def _finite(number: Any, name: str) -> float:
    if not is_finite(number):
        raise BadRecord(f"{name} is not a finite number")
    return float(number)
