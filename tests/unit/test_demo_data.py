"""The demos' data: filters, labels, and that what is held out is not trained on. Real texts only where a package is."""

import json

import pytest

from data.demo import chinese, english
from data.demo.annotators import snownlp_sentiment
from data.demo.files import build_once, package_file, write_jsonl
from utils.errors import UserError


def words(context: list[str]) -> int:
    """A stand-in for the tokenizer: 10 tokens of frame and one a word."""
    return 10 + sum(len(turn.split()) for turn in context)


def chat(number: int, num_turns: int = 8) -> list[str]:
    mood = ("I love this really great idea", "that is a terrible awful plan")
    return [f"{mood[turn % 2]} number {number} of {turn}" for turn in range(num_turns)]


def test_snownlp_tells_reviews_apart_and_calls_nothing_neutral():
    praise, complaint, empty = snownlp_sentiment([None] * 3, ["非常好，很满意", "太差了，很失望", "  "])
    assert praise > 0.8 > 0.2 > complaint
    assert empty == 0.5


def test_the_higher_score_is_chosen_and_close_pairs_are_left_out():
    pair = english.label("fine", "bad", ["hello"], (-0.2, 0.2))
    assert (pair["chosen"][-1]["content"], pair["rejected"][-1]["content"]) == ("bad", "fine")
    assert pair["chosen"][:-1] == pair["rejected"][:-1] == english.messages(["hello"])
    assert english.label("fine", "bad", ["hello"], (0.3, 0.01)) is None


def test_written_english_files_are_disjoint_and_repeatable(tmp_path, monkeypatch):
    monkeypatch.setattr(english, "load_conversations", lambda: [chat(number) for number in range(60)])
    monkeypatch.setattr(english, "prompt_length", lambda model: words)
    monkeypatch.setattr(english, "NUM_PROMPTS", {"valid": 10, "train": 50})
    monkeypatch.setattr(english, "NUM_PREFERENCES", {"valid": 6, "train": 30})
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        english.build_prompts(tmp_path / name, tmp_path)
        english.build_preferences(tmp_path / name, tmp_path)
    files = {path.name: path.read_text() for path in (tmp_path / "one").iterdir()}
    assert files == {path.name: path.read_text() for path in (tmp_path / "two").iterdir()}

    def conversations(text: str) -> set[str]:
        return {word for word, after in zip(text.split(), text.split()[1:]) if word.isdigit() and after == "of"}

    held_out = conversations(files["valid.json"])
    assert len(json.loads(files["valid.json"])) == 10 and held_out
    for other in ("train.json", "train.jsonl", "valid.jsonl"):
        assert conversations(files[other]) and not held_out & conversations(files[other])


def make_reviews(count: int) -> list[chinese.Review]:
    return [chinese.Review(f"开头{i % 400}，", f"{'好' if i % 2 else '坏'}{i}", bool(i % 2)) for i in range(count)]


def test_chinese_parts_share_no_review_and_no_held_out_opening():
    parts = chinese.split_parts(make_reviews(2000), make_reviews(400))
    assert [len(parts[name]) for name in ("dialogues", "preferences", "prompts")] == [300, 600, 256]
    held_out = {review.opening for review in parts["prompts"]}
    assert len(held_out) == 256 and parts["train"]
    assert not held_out & {review.opening for review in parts["train"] + parts["cut"]}
    ends = [review.rest for name in ("dialogues", "preferences", "train") for review in parts[name]]
    assert len(ends) == len(set(ends))


def test_an_interrupted_build_leaves_nothing_and_a_finished_one_is_kept(tmp_path, capsys):
    def interrupted(folder):
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path / "part", interrupted)
    assert list(tmp_path.iterdir()) == []
    build_once(tmp_path / "part", lambda folder: write_jsonl(folder / "b.jsonl", [{"text": "好\u2028"}]))
    build_once(tmp_path / "part", interrupted)
    assert json.loads((tmp_path / "part" / "b.jsonl").read_text("utf-8")) == {"text": "好\u2028"}
    assert capsys.readouterr().out.splitlines()[-1].endswith("ready, kept from an earlier run")


def test_a_missing_package_is_named_with_its_remedy():
    with pytest.raises(UserError, match=r"no_such_package: run `source utils/setup\.sh demo`"):
        package_file("no_such_package", "data.json")
