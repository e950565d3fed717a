"""data/preferences.py: formats, strengths, margins and subsets of preferences, ranked answers, dropped records."""

import json
from pathlib import Path

import pytest

from data.encoded import EncodedSet, Mixture
from data.formats.records import BadRecord, Record, Tally
from data.preferences import MARGIN_COLUMNS, Pair, Preference, load_preferences, parse_preferences
from data.sources import Part
from reward.encode import flipped as flip
from reward.encode import report_flips
from utils.flags.data import RecordFlags

HI = [{"role": "user", "content": "Hi"}]
HI_HELLO = [*HI, {"role": "assistant", "content": "Hello"}]
GOOD = {"prompt": "Hi", "chosen": "Hello", "rejected": "What?"}
RANKED = {"prompt": "Hi", "responses": ["one", "two", "three"]}


def load(folder: Path, *records, name: str = "x.jsonl", **options) -> tuple[list[Preference], list[str]]:
    """(preferences, what was said) of records, one a line."""
    file, tally, found = folder / name, Tally("preferences"), []
    file.write_text("\n".join(map(json.dumps, records)))
    for record in Part(str(file)).records():
        try:
            found += parse_preferences(record, tally, **options)
        except BadRecord as error:
            tally.add(f"dropped: {error}", record.source)
    return found, tally.lines()


@pytest.mark.parametrize(
    "record",
    [
        {"chosen": ["Hi", "Hello"], "rejected": ["Hi", "What?"]},
        {"chosen": HI_HELLO, "rejected": [*HI, {"role": "assistant", "content": "What?"}]},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: What?"},
        GOOD,
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello", "rejected": " What?"},
    ],
)
def test_forms_of_a_pair(tmp_path, record):
    train, _ = load(tmp_path, record)
    assert (train[0].history, train[0].answers, train[0].pairs) == (HI, ["Hello", "What?"], [Pair(0, 1)])


def test_strength_in_both_spellings_and_from_score_lists(tmp_path):
    history = "\n\nHuman: Hi\n\nAssistant: Hello\nHuman: you\n\nHuman: Bye"
    pair = {"chosen": history + "\n\nAssistant: Ciao", "rejected": history + "\n\nAssistant: Go"}
    lists = {"chosen score list": [1, 2.5], "rejected_score_list": [2, 4]}
    numbers = [{"mean preference difference": -0.5}, {"mean_preference_difference": 2}, lists]
    train, _ = load(tmp_path, *[pair | number for number in numbers])
    assert [preference.pairs[0].strength for preference in train] == [-0.5, 2.0, -1.25]  # (1 - 2 + 2.5 - 4) / 2
    assert [turn["content"] for turn in train[0].history] == ["Hi", "Hello\nHuman: you", "Bye"]


def test_a_margin_is_the_strength_unless_a_column_is_named(tmp_path):
    records = [GOOD | {"mean preference difference": -0.5, "margin": 3}, GOOD | {"margin": 2}, GOOD]
    records += [GOOD | {"chosen_score_list": [1], "rejected_score_list": [0], "my_gap": 7}]

    def margins(**options) -> list[float | None]:
        return [preference.pairs[0].margin for preference in load(tmp_path, *records, **options)[0]]

    assert margins() == [None] * 4
    assert margins(margin_columns=MARGIN_COLUMNS) == [-0.5, 2.0, None, 1.0]
    assert margins(margin_columns=("my gap",)) == [None, None, None, 7.0]


def test_pairs_of_negative_strength_are_flipped_with_their_numbers(tmp_path):
    records = [GOOD | {"mean preference difference": x} for x in (1, -2, 0)] + [GOOD]
    train, _ = load(tmp_path, *records, margin_columns=MARGIN_COLUMNS)
    swapped = [flip(preference.pairs[0]) for preference in train]
    assert swapped == [Pair(0, 1, 1.0, 1.0), Pair(1, 0, 2.0, 2.0), Pair(0, 1, 0.0, 0.0), Pair(0, 1)]
    train, _ = load(tmp_path, GOOD | {"mean preference difference": -2, "margin": 3}, margin_columns=("margin",))
    assert flip(train[0].pairs[0]) == Pair(1, 0, 2.0, 3.0)  # an annotated margin stays
    rows = [{"strengths": [pair.strength for pair in preference.pairs], "source": preference.source}
            for preference in load(tmp_path, *records)[0]]  # fmt: skip
    said = []
    report_flips(Mixture([EncodedSet(rows, None)], None, 0), said.append)
    assert said[0].startswith("preferences: 1 of 3 flipped")
    assert said[0].endswith("x.jsonl:2")
    assert "1 without a 'mean preference difference'" in said[1]


@pytest.mark.parametrize(
    ("record", "pairs"),
    [
        (RANKED, [(0, 1, None), (0, 2, None), (1, 2, None)]),
        (RANKED | {"scores": [1, 3, 2.5]}, [(1, 0, 2.0), (2, 0, 1.5), (1, 2, 0.5)]),
        (RANKED | {"ranks": [2, 1, 2]}, [(1, 0, None), (1, 2, None)]),
    ],
    ids=["by place", "by score", "by rank with a tie"],
)
def test_ranked_answers_make_a_pair_of_every_two_of_different_rank(tmp_path, record, pairs):
    train, _ = load(tmp_path, record, margin_columns=MARGIN_COLUMNS)
    assert train[0].answers == ["one", "two", "three"][: len(train[0].answers)]
    assert [(pair.better, pair.worse, pair.margin) for pair in train[0].pairs] == pairs


def test_a_response_that_occurs_twice_is_not_compared_with_itself(tmp_path):
    train, said = load(tmp_path, RANKED | {"responses": ["one", "two", "two "]})
    assert [(pair.better, pair.worse) for pair in train[0].pairs] == [(0, 1), (0, 2)]
    assert "1 with the same response twice" in said[0]


def test_a_subset_is_the_records_own_or_its_files_name(tmp_path):
    (tmp_path / "helpful-valid.json").write_text(json.dumps([GOOD]))
    (tmp_path / "helpful-train.json").write_text(json.dumps([GOOD, GOOD | {"subset": " red team "}]))
    (tmp_path / "train.json").write_text(json.dumps([GOOD]))
    train, valid = load_preferences([str(tmp_path)], RecordFlags(), str)
    assert [preference.subset for preference in train] == ["helpful", "red team", "all"]
    assert [preference.subset for preference in valid] == ["helpful"]


@pytest.mark.parametrize(
    ("place", "subset"),
    [
        ("a/helpful-train.jsonl.gz:3", "helpful"), ("a/train-00001-of-00002.parquet:row 7", "all"),
        ("owner/name[train]:1", "name"), ("owner/name[train_prefs[:10%]]:2", "name"), ("x.json:record 4", "x"),
    ],
)  # fmt: skip
def test_the_subset_of_a_place(place, subset):
    assert parse_preferences(Record(GOOD, place), Tally("preferences"))[0].subset == subset


def test_answers_as_turns_of_sharegpt(tmp_path):
    hello, what = ({"from": "gpt", "value": text} for text in ("Hello", "What?"))
    human = {
        "conversations": [{"from": "human", "value": "Hi"}],
        "system": "Be brief.",
        "chosen": hello,
        "rejected": what,
    }
    train, said = load(
        tmp_path, {"prompt": "Hi", "chosen": [hello], "rejected": [what]}, human,
        {"prompt": "Hi", "chosen": [hello], "rejected": [{"from": "human", "value": "What?"}]},
    )  # fmt: skip
    assert [p.answers for p in train] == [["Hello", "What?"]] * 2
    assert [p.history for p in train] == [HI, [{"role": "system", "content": "Be brief."}, *HI]]
    assert any("two turns of the human" in line for line in said)
