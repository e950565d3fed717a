"""Ids equal SentencePiece's own, here and wherever an exported folder is loaded; special tokens; bad folders."""

import json
import random
import shutil

import pytest
from conftest import train_sentencepiece
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from data.template import encode_prompt
from utils.errors import UserError
from utils.hub import is_hub_id
from utils.tokenizer import check_vocabulary, load_tokenizer, save_tokenizer

TEXTS = [
    "Hello, how are you?", "你好，今天天气怎么样？", "Emoji 😀 and 👩‍👩‍👧 and 🏳️‍🌈!",
    "runs  of   spaces    and\ttabs", "   leading and trailing   ",
    "def f(x):\n    if x:\n        return {'a': [1, 2]}\n",
    "mixed 中文 and English，全角　空格", "née Zoë ﬁne ½ ①", "<s>not a tag</s> <unk> <0x0A> <|Human|>",
    "", " ", "\n", "1234567890",
]  # fmt: skip


def random_texts(count: int) -> list[str]:
    rng = random.Random(7)
    parts = [*"abcdeinrst  \n\t(){}=.,:'ABÉ", "    ", "你", "好", "天气", "😀", "the ", "def ", "</s>", "▁", "ing"]
    return ["".join(rng.choices(parts, k=rng.randint(1, 40))) for _ in range(count)]


def plain(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def assert_same_ids_everywhere(model, folder, template):
    reference = SentencePieceProcessor(str(model))
    ours = load_tokenizer(str(model), template)
    save_tokenizer(ours, folder)
    elsewhere, again = AutoTokenizer.from_pretrained(folder), load_tokenizer(str(folder), template)
    for text in TEXTS + random_texts(100):
        expected = reference.encode(text)
        for tokenizer in (ours, elsewhere, again):
            assert plain(tokenizer, text) == expected, (type(tokenizer).__name__, text)
            assert tokenizer.decode(expected) == reference.decode(expected)
    for tokenizer in (elsewhere, again):
        for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id"):
            assert getattr(tokenizer, name) == getattr(ours, name)
        assert len(tokenizer) == len(ours)


@pytest.mark.parametrize(("model", "template"), [("llama_model", "moss_en"), ("tiny_model", "moss_zh")])
def test_ids_are_sentencepieces_own_here_and_elsewhere(request, tmp_path, model, template):
    assert_same_ids_everywhere(request.getfixturevalue(model), tmp_path, template)


def test_ids_of_a_model_that_normalizes(tmp_path):
    model = train_sentencepiece(tmp_path, normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True)
    assert_same_ids_everywhere(model, tmp_path / "out", "moss_en")


def test_special_ids_of_a_bare_file_and_of_a_published_folder_with_empty_ones(llama_model, tmp_path):
    shutil.copy(llama_model, tmp_path / "tokenizer.model")
    config = {"bos_token": "", "eos_token": "", "unk_token": "", "tokenizer_class": "LLaMATokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text("{}")
    for path in (llama_model, tmp_path):
        tokenizer = load_tokenizer(str(path), "moss_en")
        ids = (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        assert ids == (0, 1, 2, 0) and len(tokenizer) == 32000


def test_recorded_added_tokens_keep_their_ids(tiny_model, tmp_path):
    shutil.copy(tiny_model, tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|MOSS|>": 1501, "[PAD]": 1502, "<|Human|>": 1500}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]"}))
    tokenizer = load_tokenizer(str(tmp_path), "moss_zh")
    assert tokenizer.convert_tokens_to_ids(["<|Human|>", "<|MOSS|>", "[PAD]"]) == [1500, 1501, 1502]
    assert tokenizer.pad_token_id == 1502  # its own pad: neither eos nor bos
    save_tokenizer(tokenizer, tmp_path / "out")
    elsewhere = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert elsewhere.convert_tokens_to_ids(["<|Human|>", "<|MOSS|>", "[PAD]"]) == [1500, 1501, 1502]


def test_added_tokens_with_a_gap_are_refused(tiny_model, tmp_path):
    shutil.copy(tiny_model, tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|Human|>": 1505}))
    with pytest.raises(UserError, match=r"<\|Human\|>.*1505"):
        load_tokenizer(str(tmp_path), "moss_zh")


HISTORIES = [
    ["Say it.", '"Quoted" words', "And a list?", "- one\n- two", "Code?", "`x = 1`", "Bold?", "**Yes**", "Thanks"],
    ["你好，今天天气怎么样？", "很好！", "那明天呢？", "“晴”。", "谢谢"],
    ["Smile", ":) // ::", "Again", "Assistant: :)", "Assistant: // Human: go on"],
    ["Two\n\nparagraphs", "One\n\nAssistant:(two)", "  spaces  in   here"],
]


@pytest.mark.parametrize("template", ["moss_en", "moss_zh"])
def test_exported_chat_template_prompts_as_ours(llama_model, tmp_path, template):
    tokenizer = load_tokenizer(str(llama_model), template)
    save_tokenizer(tokenizer, tmp_path)
    elsewhere = AutoTokenizer.from_pretrained(tmp_path)
    random_history = [text.strip().replace("</s>", "") or "." for text in random_texts(61)]
    for texts in [*HISTORIES, *([text] for text in HISTORIES[1]), random_history]:
        turns = [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts)]
        for whole in (turns, [{"role": "system", "content": "Be kind."}, *turns]):
            theirs = elsewhere.apply_chat_template(whole, add_generation_prompt=True, return_dict=False)
            assert theirs == encode_prompt(tokenizer, whole, template)


def test_a_pad_that_ends_answers_is_replaced(tiny_model, tmp_path):
    shutil.copy(tiny_model, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "</s>"}))
    assert load_tokenizer(str(tmp_path)).pad_token_id == 0  # unk


def test_other_tokenizers_survive_saving(chat_folder, tmp_path):
    tokenizer = load_tokenizer(str(chat_folder), "chat")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id  # no unk, no pad
    save_tokenizer(tokenizer, tmp_path)
    again = load_tokenizer(str(tmp_path), "chat")
    for text in TEXTS:
        assert plain(again, text) == plain(tokenizer, text)
    assert again.chat_template == tokenizer.chat_template


def test_check_vocabulary(tiny_model):
    tokenizer = load_tokenizer(str(tiny_model), "moss_zh")  # 1500 pieces and two tags
    assert check_vocabulary(tokenizer, 1502, "m") == 1502
    assert check_vocabulary(tokenizer, 1536, "m") == 1536  # a padded embedding stays
    assert check_vocabulary(tokenizer, 1500, "m") == 1502  # the tags resize it


def test_hub_ids_and_paths():
    assert is_hub_id("owner/name")
    for path in ("data/nothing", "./owner/name", "/abs/name", "word", "a/b/c", "owner/name.json", "models\\x"):
        assert not is_hub_id(path), path


def test_cut_off_and_other_model_files(tiny_model, tmp_path):
    content = tiny_model.read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"^--model: .* damaged"):
        load_tokenizer(str(tmp_path), "moss_en", flag="--model")
    model = train_sentencepiece(tmp_path, add_dummy_prefix=False)
    with pytest.raises(UserError, match=r"--tokenizer_name_or_path: .*not in LLaMA's format"):
        load_tokenizer(str(model), "moss_en")


def test_missing_paths_stay_local(monkeypatch):
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_: pytest.fail("went to the hub"))
    with pytest.raises(UserError, match=r"--tokenizer_name_or_path.*does not exist"):
        load_tokenizer("data/nowhere", "moss_en")
