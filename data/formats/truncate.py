"""Drop the oldest exchanges of dialogues until the rest fits a token limit."""

from collections.abc import Callable, Generator
from typing import TypeVar

from data.texts import Turns

Encoded = TypeVar("Encoded")


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
