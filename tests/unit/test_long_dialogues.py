"""Long dialogues: the same ids, masks and turns as by trying every prefix and every number of turns, in linear time."""

import random
import time

import pytest

from data.chat import MANY_TURNS, encode_last_answer, mask_earlier_answers, turn_end
from data.formats.truncate import newest_turns
from data.template import encode_dialogue, encode_prompt
from data.texts import Texts
from reward.scoring.ensemble import Encoding
from tests.helpers.data import encode_one, load_prompts
from tests.helpers.families import FAMILIES, family_tokenizer
from tests.helpers.tiny_run import write_json
from utils.tokenizer import load_tokenizer

TEXTS = [
    "Hi",
    "Hello.",
    "Bye?",
    "See you.",
    "a\n\nb",
    "<think>x</think>So.",
    "<think>\n\n</think>\n\nNo.",
    "7391 7",
    "Hi Hi",
]


def dialogue(rng: random.Random, size: int, system: bool, texts=TEXTS) -> list[dict]:
    turns = [{"role": ("user", "assistant")[k % 2], "content": rng.choice(texts)} for k in range(size)]
    return [{"role": "system", "content": "Be brief."}] * system + turns


def mask_by_prefixes(tokenizer, turns, ids):
    """The mask and the rewritten answers, by rendering the dialogue up to each answer whole."""
    end, mask, rewritten, texts = turn_end(tokenizer, "chat"), [False] * len(ids), [], Texts(tokenizer)
    for k in (k for k, turn in enumerate(turns) if turn["role"] == "assistant"):
        start = texts.chat(turns[:k], True)
        own = start + encode_last_answer(texts, turns[: k + 1], start)
        if ids[: len(own)] != own:
            rewritten.append(k)
            continue
        stop = len(own) - len(end.ids) + end.num_generated
        mask[len(start) : stop] = [True] * (stop - len(start))
    return mask, rewritten


@pytest.mark.parametrize("texts", [TEXTS, ["Hi", "Hi Hi"]], ids=["many texts", "two texts, one the end of the other"])
@pytest.mark.parametrize("name", FAMILIES)
def test_masks_of_long_dialogues_are_those_of_all_prefixes(name, texts):
    family = FAMILIES[name]
    tokenizer, rng = family_tokenizer(family), random.Random(name)
    tokenizer.chat_template_kwargs = family.arguments
    for system in (False, True)[: 2 - (family.system is None)]:
        turns = dialogue(rng, MANY_TURNS + 11, system, texts)
        ids = encode_prompt(tokenizer, turns, "chat")
        mask, rewritten = mask_earlier_answers(Texts(tokenizer), turns, ids)
        assert (mask, rewritten) == mask_by_prefixes(tokenizer, turns, ids)
        assert True in mask or rewritten


def drop_oldest(turns):
    system = [turn for turn in turns[:1] if turn["role"] == "system"]
    spoken = turns[len(system) :]
    return system + spoken[2:] if len(spoken) > 2 else []


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("size", [*range(1, 12), 40, 41])
def test_as_few_turns_go_as_possible(size, system):
    turns = dialogue(random.Random(size), size, system)
    for limit in (0, 1, 2, 3, 5, 9, 20, 100, 10**6):
        kept = turns
        while kept and sum(len(turn["content"]) for turn in kept) > limit:
            kept = drop_oldest(kept)

        def encode_short(turns, limit=limit):
            length = sum(len(turn["content"]) for turn in turns)
            return length if length <= limit else None

        found, length = newest_turns(turns, encode_short, limit)
        assert (found, length) == (kept, encode_short(kept)) if kept else length is None


def test_an_encoded_dialogue_is_that_of_the_turns_that_fit(chat_folder):
    tokenizer = load_tokenizer(str(chat_folder), "chat")
    turns = dialogue(random.Random(3), 60, True)
    for limit in (60, 200, 10_000):
        kept = turns
        while len((parts := encode_dialogue(tokenizer, kept, "chat"))[0]) - 1 > limit:  # ends in a newline
            kept = drop_oldest(kept)
        found, removed = encode_one(tokenizer, turns, "chat", limit)
        assert (found.ids, found.answer_mask) == (parts[0][:-1], parts[1][:-1]) and removed == len(turns) - len(kept)
        assert Encoding(tokenizer, "chat", limit + 1)(turns) == (parts[0], removed > 0)


@pytest.mark.parametrize(("size", "limit", "seconds"), [(1001, 10**6, 3), (100_001, 2048, 20)])
@pytest.mark.parametrize("template", ["chat", "moss_en"])
def test_the_time_of_long_dialogues(chat_folder, tmp_path, template, size, limit, seconds):
    """1 and 8 s where nothing else runs."""
    tokenizer, turns = load_tokenizer(str(chat_folder), template), dialogue(random.Random(4), size, False)
    write_json(tmp_path / "data.json", [[turn["content"] for turn in turns]] * 2)
    started = time.process_time()
    found, removed = encode_one(tokenizer, turns[:-1], template, limit)
    assert len(found.ids) <= limit and (removed > 0) == (size > 1001)
    assert time.process_time() - started < seconds
    (prompt,), _ = load_prompts(str(tmp_path / "data.json"), tokenizer, template, limit, 1, 0, str)
    assert len(prompt.ids) <= limit
    assert time.process_time() - started < 2 * seconds
