"""Encode records within a token limit, and report the records that were truncated or dropped."""

from collections.abc import Callable, Generator, Iterable
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


def newest_turns(
    turns: Turns, encode: Callable[[Turns], Encoded | None], max_turns: int
) -> tuple[Turns, Encoded | None]:  # fmt: skip
    """Drops the fewest oldest exchanges that make the rest fit. Returns (the rest, its encoding); a system turn stays.

    encode: returns None for turns that do not fit; if no turns fit, these are the last exchange and None. Assumes that
    fewer turns are shorter, and that each takes at least one token, so that at most `max_turns` fit.
    """
    return newest_of_batch([turns], lambda _, turns: encode(turns), max_turns)[0]


def newest_of_batch(
    dialogues: list[Turns], encode: Callable[[int, Turns], Encoded | None], max_turns: int,
    prepare: Callable[[dict[int, Turns]], None] = lambda _: None,
) -> list[tuple[Turns, Encoded | None]]:  # fmt: skip
    """Returns `newest_turns` of each dialogue. encode: gets the index of the dialogue, too.

    prepare: gets what will be encoded next, by index of the dialogue, one number of turns of each.
    """
    searches = [_search(turns, max_turns) for turns in dialogues]
    wanted, found = {k: next(search) for k, search in enumerate(searches)}, {}
    while wanted:
        prepare(wanted)
        for k, turns in list(wanted.items()):
            try:
                wanted[k] = searches[k].send(encode(k, turns))
            except StopIteration as end:
                found[k] = end.value
                del wanted[k]
    return [found[k] for k in range(len(dialogues))]


def _search(turns: Turns, max_turns: int) -> Generator[Turns, Encoded | None, tuple[Turns, Encoded | None]]:
    """Bisects the number of exchanges to drop: yields turns, and is sent their encodings."""
    system = [turn for turn in turns[:1] if turn["role"] == "system"]
    spoken, found = turns[len(system) :], {}
    last = max(0, len(spoken) - 1) // 2  # the most exchanges that can go
    low, high = min(last, max(0, len(spoken) - max_turns + 1) // 2), last + 1
    dropped = low
    while low < high:
        found[dropped] = yield system + spoken[2 * dropped :]
        low, high = (dropped + 1, high) if found[dropped] is None else (low, dropped)
        dropped = (low + high) // 2
    return system + spoken[2 * min(low, last) :], found.get(low)
