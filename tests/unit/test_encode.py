"""Batches give the ids, masks and turns of the plain way (tests/helpers/plain_encoding.py) with all tokenizers."""

import random

import pytest
from conftest import train_sentencepiece
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data.encode import encode_answers, encode_dialogues, encode_prompts
from tests.helpers.families import FAMILIES, family_tokenizer
from tests.helpers.fuzzed_dialogues import dialogue, text
from tests.helpers.fuzzing import ASKED
from tests.helpers.plain_encoding import Plain
from tests.helpers.tiny import tiny_tokenizer_folder
from tests.helpers.tiny_run import write_json
from utils.errors import UserError
from utils.tokenizer import encode_texts, load_tokenizer, save_tokenizer

MOSS = ["moss_en", "moss_zh", "moss_en fast", "moss_zh fast"]
OTHERS = ["SentencePiece with tags", "exported", "a prefix at the start alone", "a tag that takes in spaces"]
MAIN = ["moss_en", "moss_zh", "ChatML", "Qwen 3", "Llama 3.1", "Phi 3", "Mistral", "DeepSeek R1"]


def sentencepiece(folder, family: str):
    """A LLaMA-format tokenizer.model of 400 pieces with the family's tags, which take in the spaces behind them."""
    path = tiny_tokenizer_folder(folder)
    tags = [tag for tag in FAMILIES[family].special if tag not in ("<unk>", "<s>", "</s>")]
    added = {
        str(400 + k): {"content": tag, "lstrip": False, "rstrip": k % 2 == 1, "normalized": False, "special": True}
        for k, tag in enumerate(tags)
    }
    template = family_tokenizer(FAMILIES[family]).chat_template
    config = {"added_tokens_decoder": added, "chat_template": template, "eos_token": FAMILIES[family].eos}
    write_json(path / "tokenizer_config.json", config)
    return load_tokenizer(str(path), "chat")


def make(name: str, folder, request):
    """(tokenizer, template, whether it takes system turns) of a case."""
    if name in MOSS:
        template = name.split()[0]
        path = request.getfixturevalue("chat_folder" if "fast" in name else "llama_model")
        return load_tokenizer(str(path), template), template, True
    if name in FAMILIES:
        tokenizer, family = family_tokenizer(FAMILIES[name]), FAMILIES[name]
        tokenizer.chat_template_kwargs = family.arguments
        return tokenizer, "chat", family.system is not None
    tokenizer = sentencepiece(folder, "Phi 3")
    if name == "SentencePiece with tags":
        return tokenizer, "chat", True
    save_tokenizer(tokenizer, folder / "exported")
    tokenizer = load_tokenizer(str(folder / "exported"), "chat")
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    if name == "a prefix at the start alone":  # as LLaMA's tokenizers of `legacy: false`
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif name == "a tag that takes in spaces":
        backend.add_special_tokens([AddedToken("<|user|>", special=True, normalized=False, lstrip=True)])
        backend.add_tokens([AddedToken("hello", normalized=True)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|endoftext|>")
    wrapped.chat_template = tokenizer.chat_template
    return wrapped, "chat", True


def compare(tokenizer, template: str, system: bool, size: int, seed: int) -> None:
    """Compares the three functions with the reference over batches of 50 dialogues, each with another limit."""
    rng, plain = random.Random(seed), Plain(tokenizer, template)
    tags = [token.content for token in tokenizer.added_tokens_decoder.values()]
    for _ in range(size // 50):
        limit = rng.choice([30, 100, 300, 1000, 10**6])
        drawn = [dialogue(rng, tags, system) for _ in range(50)]
        prompts = [turns[:-1] for turns in drawn[::5]]
        items = [(turns[:-1], [turns[-1]["content"], text(rng, tags)]) for turns in drawn[::3]]
        assert encode_prompts(tokenizer, prompts, template, limit) == plain.prompts(prompts, limit)
        assert encode_dialogues(tokenizer, drawn, template, limit) == plain.dialogues(drawn, limit)
        assert encode_answers(tokenizer, items, template, limit) == plain.answers(items, limit)


@pytest.mark.parametrize("name", [*MAIN, *MOSS[2:], *OTHERS])
def test_batches_are_as_one_by_one(name, tmp_path, request):
    compare(*make(name, tmp_path, request), 300 if name in MAIN else 50, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MOSS, *FAMILIES, *OTHERS])
def test_many_batches_are_as_one_by_one(name, tmp_path, request):
    compare(*make(name, tmp_path, request), 20_000 if ASKED else 1000, 1)


def test_a_batch_with_a_dialogue_that_the_template_refuses():
    tokenizer, turns = family_tokenizer(FAMILIES["Gemma 2"]), [{"role": "user", "content": "Hi"}]
    refused = [{"role": "system", "content": "Be brief."}, *turns]
    with pytest.raises(UserError, match=r"refuses a dialogue [(]System role not supported"):
        encode_prompts(tokenizer, [turns, refused, turns], "chat", 100)


@pytest.mark.parametrize("text", ["Hi 😀", "Hi 😀😀", "Hi", "😀 </s>"])
def test_an_unknown_character_can_be_an_added_token(tmp_path, text):
    """transformers' wrapper of SentencePiece looks for the text of an unknown piece among the added tokens."""
    tokenizer = load_tokenizer(str(train_sentencepiece(tmp_path, byte_fallback=False)), "moss_en")
    tokenizer.add_special_tokens({"additional_special_tokens": ["😀"]}, replace_extra_special_tokens=False)
    expected = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert encode_texts(tokenizer, [text, text], True) == [expected] * 2
    assert (tokenizer.convert_tokens_to_ids("😀") in expected) == (text.count("😀") == 1)
