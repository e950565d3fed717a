"""The unit of the critic's head: the running mean and deviation of the returns. Pure.

Values are V = mean + deviation * (head - offset). The model keeps the same as V = scale * head - center.
"""

from typing import NamedTuple


class Unit(NamedTuple):
    """Values are scale * head - center, where `head` is the output of the linear layer."""

    scale: float = 1.0
    center: float = 0.0


class Change(NamedTuple):
    """A new unit, the factor of the head's weight, and what becomes of a value V: slope * V + shift."""

    unit: Unit
    weight_factor: float = 1.0
    slope: float = 1.0
    shift: float = 0.0


def change_of_unit(unit: Unit, old: tuple[float, float], new: tuple[float, float], keep_values: bool) -> Change:
    """Returns how the critic changes when (mean, deviation) of the returns change from `old` to `new`.

    keep_values (PopArt, van Hasselt et al. 2016, eq. 8 and 9): the head's weight is rescaled so that no value changes.
    Otherwise the head stays, and values move and stretch as the returns did.
    """
    if keep_values:
        return Change(Unit(new[1], unit.center), unit.scale / new[1])
    slope = new[1] / old[1]
    shift = new[0] - slope * old[0]
    return Change(Unit(slope * unit.scale, slope * unit.center - shift), 1.0, slope, shift)
