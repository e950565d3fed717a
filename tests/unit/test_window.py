"""data/window.py: what does not fit is cut or dropped, and both are said with their number and first place."""

from types import SimpleNamespace

from data.window import encode_fitting


def item(place: str, *turns: int) -> SimpleNamespace:
    return SimpleNamespace(source=place, turns=turns)


def newest_up_to_ten(record) -> tuple[tuple[int, ...] | None, int]:
    """The last turns whose sum is at most 10."""
    for cut in range(len(record.turns)):
        if sum(record.turns[cut:]) <= 10:
            return record.turns[cut:], cut
    return None, 0


def test_what_is_cut_and_what_is_dropped_is_said_with_its_first_place():
    said = []
    records = [item("x:1", 4), item("x:2", 7, 6), item("x:3", 11), item("x:4", 9, 2, 3), item("x:5", 99)]
    assert encode_fitting(records, newest_up_to_ten, "pairs", said.append) == [(4,), (6,), (2, 3)]
    assert said == [
        "pairs: 2 truncated (oldest turns dropped) to --context_truncate; first at x:2",
        "pairs: 2 dropped: the last exchange alone exceeds --context_truncate; first at x:3",
    ]


def test_nothing_is_said_when_all_fit():
    said = []
    assert encode_fitting([item("x:1", 1, 2)], newest_up_to_ten, "pairs", said.append) == [(1, 2)]
    assert said == []
