"""reward/encode.py and reward/batches.py: comparable ends of cut pairs, rows and weights of pairs, what is refused."""

import json

import pytest
import torch

from data.preferences import Pair, Preference
from reward.batches import Comparison, pair_index
from reward.config import RewardConfig
from reward.encode import load_comparisons
from tests.helpers.data import encode_preference
from tests.helpers.tiny import tiny_tokenizer_folder
from utils.tokenizer import load_tokenizer

TURNS = [("user", "first " * 20), ("assistant", "second " * 20), ("user", "Third?")]
HISTORY = [{"role": role, "content": text.strip()} for role, text in TURNS]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(str(tiny_tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))))


def preference(*answers: str, subset: str = "all", history=HISTORY) -> Preference:
    return Preference(history, list(answers), [Pair(0, 1, 0.5, 2.0)], subset, "file.json:1")


def answers_of(item: Comparison) -> list[list[int]]:
    return [ids[item.prompt_length :] for ids in item.answers]


def test_truncation_drops_the_oldest_turns_and_keeps_the_answers_whole(tokenizer):
    pair = preference("A good answer.", "No.")
    whole, cut = encode_preference(pair, tokenizer, "moss_en", 1000)
    assert cut == 0
    short, cut = encode_preference(pair, tokenizer, "moss_en", 64)
    assert cut == 1
    assert answers_of(short) == answers_of(whole)
    assert short.answers[0][0] == 1
    assert [ids[-1] for ids in short.answers] == [2, 2]
    assert tokenizer.decode(answers_of(short)[0][:-1]).strip() == "A good answer."
    assert encode_preference(pair, tokenizer, "moss_en", 5) == (None, 0)
    assert (short.pairs, short.margins, short.answer_lengths) == ([(0, 1)], [2.0], whole.answer_lengths)


def test_a_long_answer_cuts_the_history_of_all_its_rivals_alike(tokenizer):
    """Only the last answer is too long for the window with the whole history; all lose it."""
    short, long = "No.", "yes " * 30
    room = len(encode_preference(preference(short, "Hm."), tokenizer, "moss_en", 1000)[0].answers[0]) + 10
    assert encode_preference(preference(short, "Hm."), tokenizer, "moss_en", room)[1] == 0
    item, cut = encode_preference(preference(short, "Hm.", long.strip()), tokenizer, "moss_en", room)
    assert cut == 1
    prompts = {tuple(ids[: item.prompt_length]) for ids in item.answers}
    assert len(prompts) == 1
    assert len(item.answers) == 3
    assert item.tokens == sum(len(ids) for ids in item.answers)
    assert item.padded_tokens == 3 * len(item.answers[2])


def test_held_out_labels_stay_as_people_gave_them(tokenizer, tmp_path):
    records = [{"prompt": "Hi", "chosen": "a", "rejected": "b", "mean preference difference": x} for x in (2, -1)]
    for name in ("train.json", "valid.json"):
        (tmp_path / name).write_text(json.dumps(records * 2))
    paths = {"hf_model_name_or_path": "M", "data_path": str(tmp_path), "model_save_path": "O"}
    config = RewardConfig(**paths, batch_size=4, flip_negative=True, use_margin=True)
    train, valid = load_comparisons(config, tokenizer, str)
    assert [item.pairs for item in train.sets[0]] == [[(0, 1)], [(1, 0)]] * 2
    assert [item.margins for item in train.sets[0]] == [[2.0], [1.0]] * 2
    assert [item.pairs for item in valid] == [[(0, 1)]] * 4


def comparison(*pairs: tuple[int, int], answers: int = 2) -> Comparison:
    ids = [[1, 5, 6 + i] for i in range(answers)]
    return Comparison(ids, 2, list(pairs), [float(i) for i in range(len(pairs))], "all", "")


def test_rows_of_pairs_follow_the_answers_and_every_prompt_weighs_one():
    index = pair_index([comparison((1, 0)), comparison((0, 1), (0, 2), (1, 2), answers=3), comparison((0, 1))])
    assert index.better.tolist() == [1, 2, 2, 3, 5]
    assert index.worse.tolist() == [0, 3, 4, 4, 6]
    assert torch.equal(index.weights, torch.tensor([1, 1 / 3, 1 / 3, 1 / 3, 1]))
    assert index.margins.tolist() == [0, 0, 1, 2, 0]
