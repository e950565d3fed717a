"""Encode records within a token limit, and report the records that were truncated or dropped."""

from collections.abc import Callable, Iterable
from typing import TypeVar

from data.formats.records import Tally
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
