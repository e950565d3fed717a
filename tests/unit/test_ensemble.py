"""Reward models asked about dialogues: the same scores whatever the batches; what overflows the window is cut."""

import pytest
import torch

from data.template import encode_dialogue
from reward.ensemble import Encoding, score_dialogues
from tests.parts import tiny_scalar_model
from tests.tiny import VOCAB, tiny_tokenizer_folder
from utils.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(str(tiny_tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))), "moss_en")


def dialogue(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts)]


DIALOGUES = [
    dialogue("Why is the sky blue?", "Because air scatters blue light most."),
    dialogue("Hi", ""),
    dialogue("Hi", "Hello!", "Name a tree, a bird and a fish.", "Oak, wren, carp."),
]


@pytest.mark.parametrize("max_tokens", [1, 60, 10_000])
def test_scores_come_in_the_order_given_and_do_not_depend_on_batches(tokenizer, max_tokens):
    model = tiny_scalar_model(vocab=VOCAB).requires_grad_(False)
    scores = score_dialogues(model, tokenizer, "moss_en", DIALOGUES, max_tokens)
    for turns, found in zip(DIALOGUES, scores, strict=True):
        ids = torch.tensor([encode_dialogue(tokenizer, turns, "moss_en")[0]])
        assert ids[0, -1] == tokenizer.eos_token_id
        assert found == pytest.approx(float(model(ids, torch.ones_like(ids).bool())[0, -1]), abs=1e-5)


def test_no_dialogues(tokenizer):
    assert score_dialogues(tiny_scalar_model(vocab=VOCAB), tokenizer, "moss_en", [], 100) == []


def test_the_oldest_turns_go_until_the_dialogue_fits_the_window(tokenizer):
    turns = dialogue("one two three", "four", "five six", "seven", "eight", "nine")
    whole, _ = encode_dialogue(tokenizer, turns, "moss_en")
    without_first, _ = encode_dialogue(tokenizer, turns[2:], "moss_en")
    last_only, _ = encode_dialogue(tokenizer, turns[4:], "moss_en")
    for window, expected, cut in [
        (None, whole, False),
        (len(whole), whole, False),
        (len(whole) - 1, without_first, True),
        (len(without_first), without_first, True),
        (len(without_first) - 1, last_only, True),
        (len(last_only) - 1, last_only[:1] + last_only[2:], True),  # the BOS stays, and so does the whole answer
    ]:
        assert Encoding(tokenizer, "moss_en", window)(turns) == (expected, cut), window
