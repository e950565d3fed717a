"""data/formats/truncate.py: what does not fit is cut or dropped, and both are said with their number and places."""

from types import SimpleNamespace

from data.formats.records import Tally
from data.formats.truncate import encode_fitting


def item(place: str, *turns: int) -> SimpleNamespace:
    return SimpleNamespace(source=place, turns=turns)


def newest_up_to_ten(record) -> tuple[tuple[int, ...] | None, int]:
    """The last turns whose sum is at most 10."""
    for cut in range(len(record.turns)):
        if sum(record.turns[cut:]) <= 10:
            return record.turns[cut:], cut
    return None, 0


def test_what_is_cut_and_what_is_dropped_is_said_with_its_places():
    said = []
    records = [item("x:1", 4), item("x:2", 7, 6), item("x:3", 11), item("x:4", 9, 2, 3), item("x:5", 99)]
    assert encode_fitting(records, newest_up_to_ten, "pairs", said.append) == [(4,), (6,), (2, 3)]
    assert said == [
        "pairs: 2 truncated (oldest turns dropped) to --context_truncate; first at x:2, then :4",
        "pairs: 2 dropped: the last exchange alone exceeds --context_truncate; first at x:3, then :5",
    ]


def test_the_first_few_places_are_named():
    tally = Tally("records")
    for place in ("a:1", "a:1", "a:7", "b:2", "a:9", "b:3", "b:3", "b:4", "b:5"):
        tally.add("bad" if place != "b:5" else "worse", place)
    assert tally.lines() == [
        "records: 8 bad; first at a:1, then :7, b:2, a:9, b:3, …",
        "records: 1 worse; first at b:5",
    ]


def test_nothing_is_said_when_all_fit():
    said = []
    assert encode_fitting([item("x:1", 1, 2)], newest_up_to_ten, "pairs", said.append) == [(1, 2)]
    assert said == []
