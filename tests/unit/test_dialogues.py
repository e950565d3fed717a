"""data/dialogues.py: the flag in messages, what is cut, and the stream of batches that SFT and ptx share."""

from itertools import islice

import pytest

from data.dialogues import Dialogue, EncodedDialogue, batches, encode_dialogues, load_dialogues
from data.order import order
from data.template import encode_dialogue
from utils.errors import UserError
from utils.tokenizer import load_tokenizer


def test_the_flag_that_gave_the_path_is_named(tmp_path):
    flag = "--ppo_pretrain_data_path"
    (tmp_path / "x.jsonl").write_text('["only a question"]')
    (tmp_path / "x.txt").write_text("")
    for path in ("/nowhere", tmp_path, tmp_path / "x.txt", tmp_path / "x.jsonl"):
        with pytest.raises(UserError, match=f"^{flag}"):
            load_dialogues(str(path), 0, 0, lambda _: None, flag)


def test_long_dialogues_lose_their_oldest_turns_or_go(tiny_model):
    tokenizer, said = load_tokenizer(str(tiny_model), "moss_en"), []
    turns = [{"role": role, "content": "word " * 30 + "."} for role in ("user", "assistant")]
    short = [{"role": "user", "content": "Third?"}, {"role": "assistant", "content": "Fourth."}]
    dialogues = [Dialogue(turns + short, "x:1"), Dialogue(turns, "x:2"), Dialogue(short, "x:3")]
    fitting = encode_dialogues(tokenizer, dialogues, "moss_en", 30, said.append, "--maxlen_prompt")
    expected = encode_dialogue(tokenizer, short, "moss_en")
    assert [(item.ids, item.answer_mask, item.source) for item in fitting] == [(*expected, "x:1"), (*expected, "x:3")]
    assert said[0].endswith("to --maxlen_prompt; first at x:1")
    assert said[1].endswith("exceeds --maxlen_prompt; first at x:2")


def items(name: str, count: int) -> list[EncodedDialogue]:
    return [EncodedDialogue([1], [False], f"{name}{i}") for i in range(count)]


def test_without_weights_all_sets_are_one():
    stream = batches([items("a", 3), items("b", 4)], 5, seed=2)
    names = ["a0", "a1", "a2", "b0", "b1", "b2", "b3"]
    seen = [item.source for batch in islice(stream, 4) for item in batch]
    assert seen == [names[i] for i in order(0, 20, 7, seed=2)]


def test_weights_set_the_shares():
    stream = batches([items("a", 3), items("b", 400)], 100, seed=2, weights=[3, 1])
    seen = [item.source[0] for batch in islice(stream, 10) for item in batch]
    assert seen.count("a") == 750
    assert 60 <= seen[:100].count("a") <= 90
