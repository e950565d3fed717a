"""Records that have to fit into a window of tokens: one way to encode them all, and to say what did not fit."""

from collections.abc import Callable, Iterable
from typing import TypeVar

from data.formats.records import Tally

Item = TypeVar("Item")
Encoded = TypeVar("Encoded")


def encode_fitting(
    items: Iterable[Item],
    encode: Callable[[Item], tuple[Encoded | None, int]],
    what: str,
    say: Callable[[str], None],
    flag: str = "--context_truncate",
) -> list[Encoded]:
    """All `items` that fit, encoded; how many lost turns and how many had to go is said, with the first place of each.

    encode: item -> (its encoding, or None when even its last exchange is too long; how many turns it lost). Every item
    has its place as `source`; `what` names them in the message, `flag` the limit.
    """
    tally, kept = Tally(what), []
    for item in items:
        encoded, cut = encode(item)
        if encoded is None:
            tally.add(f"dropped: the last exchange alone exceeds {flag}", item.source)
            continue
        if cut:
            tally.add(f"truncated (oldest turns dropped) to {flag}", item.source)
        kept.append(encoded)
    for line in tally.lines():
        say(line)
    return kept
