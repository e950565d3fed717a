"""Encode records within a token limit, and report the records that were truncated or dropped."""

from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import TypeVar

from data.formats.records import Tally
from data.texts import Turns
from utils.errors import Say
from utils.watchdog import with_progress

Item = TypeVar("Item")
Encoded = TypeVar("Encoded")


def encode_fitting(
    items: Iterable[Item], encode: Callable[[Item], tuple[Encoded | None, int]], what: str, say: Say,
    flag: str = "--context_truncate",
) -> list[Encoded]:  # fmt: skip
    """Returns the encodings of all items that fit; reports how many were truncated and how many were dropped.

    encode: item -> (encoding, None if its last exchange alone is too long; number of turns removed). what, flag: names
    of the items and of the limit.
    """
    tally, kept = Tally(what), []
    for item in with_progress(items, f"encoding of {what}"):
        encoded, removed = encode(item)
        if encoded is None:
            tally.add(f"dropped: the last exchange alone exceeds {flag}", item.source)
            continue
        if removed:
            tally.add(f"truncated (oldest turns dropped) to {flag}", item.source)
        kept.append(encoded)
    tally.report(say)
    return kept


def recent_turns(turns: Turns, max_turns: int) -> Turns:
    """Drops the fewest oldest exchanges that leave at most `max_turns` beside a system turn, but not the last one."""
    system = [turn for turn in turns[:1] if turn["role"] == "system"]
    spoken = turns[len(system) :]
    return system + spoken[2 * min(_last(spoken), max(0, len(spoken) - max_turns + 1) // 2) :]


def newest_turns(
    turns: Turns, encode: Callable[[Turns], Encoded | None], max_turns: int
) -> tuple[Turns, Encoded | None]:  # fmt: skip
    """Drops the fewest oldest exchanges that make the rest fit. Returns (the rest, its encoding); a system turn stays.

    encode: returns None for turns that do not fit; if no turns fit, these are the last exchange and None. Assumes that
    fewer turns are shorter, and that each takes at least one token, so that at most `max_turns` fit.
    """
    turns = recent_turns(turns, max_turns)
    system = [turn for turn in turns[:1] if turn["role"] == "system"]
    spoken, found = turns[len(system) :], {}
    last = _last(spoken)

    def fits(dropped: int) -> bool:
        found[dropped] = encode(system + spoken[2 * dropped :])
        return found[dropped] is not None

    dropped = bisect_left(range(1, last + 1), True, key=fits) + 1 if not fits(0) else 0
    return system + spoken[2 * min(dropped, last) :], found.get(dropped)


def _last(spoken: Turns) -> int:
    """Returns the most exchanges that can go."""
    return max(0, len(spoken) - 1) // 2
