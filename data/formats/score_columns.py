"""Numbers that annotators and reward models left in a preference record, whichever way their columns are spelt."""

import sys
from typing import Any

from data.formats.records import BadRecord

STRENGTH, DEVIATION = "mean preference difference", "std preference difference"
CHOSEN_SCORES, REJECTED_SCORES = "chosen score list", "rejected score list"


def column_of(value: dict, name: str) -> Any:
    """What stands in the column `name`, also where its spaces are underscores or the other way round; None: nothing."""
    spellings = (name, name.replace(" ", "_"), name.replace("_", " "))
    return next((value[key] for key in spellings if value.get(key) is not None), None)


def number_of(value: dict, name: str) -> float | None:
    """The finite number in the column `name`, None without one. Raises BadRecord for anything else."""
    number = column_of(value, name)
    return None if number is None else finite(number, name)


def finite(number: Any, name: str) -> float:
    """The number as a float. Raises BadRecord unless it is a finite number."""
    if not is_finite(number):
        raise BadRecord(f"{name} is not a finite number")
    return float(number)


def is_finite(value: Any) -> bool:
    """Whether it is a number, and one that a float can hold: JSON's integers may have hundreds of digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max  # False for NaN


def numbers_of(value: dict, name: str) -> list[float] | None:
    """The list of finite numbers in the column `name`, None without one. Raises BadRecord for anything else."""
    numbers = column_of(value, name)
    if numbers is None:
        return None
    if not isinstance(numbers, list) or not numbers:
        raise BadRecord(f"{name} is not a list of numbers")
    return [finite(number, f"an item of {name}") for number in numbers]


def strength_of(value: dict) -> float | None:
    """Mean score difference over an ensemble: its column, else the mean over both score lists. Part II §2.

    Raises BadRecord for what is no finite number, and for score lists of different lengths.
    """
    strength = number_of(value, STRENGTH)
    chosen, rejected = numbers_of(value, CHOSEN_SCORES), numbers_of(value, REJECTED_SCORES)
    if strength is not None or chosen is None or rejected is None:
        return strength
    if len(chosen) != len(rejected):
        raise BadRecord(f"{CHOSEN_SCORES} and {REJECTED_SCORES} are of different lengths")
    return (sum(chosen) - sum(rejected)) / len(chosen)
