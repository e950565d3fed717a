"""Chat models over a LLaMA-format tokenizer.model (Phi 3, Zephyr): their tags, ends and white space."""

import json

import pytest
from transformers import AutoTokenizer

from data.chat import turn_end
from data.template import encode_dialogue, encode_prompt
from tests.helpers.families import FOLDER
from tests.helpers.tiny import tiny_tokenizer_folder
from utils.errors import UserError
from utils.tokenizer import load_tokenizer, save_tokenizer, template_of

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
TAGS = {
    "<|endoftext|>": False,
    "<|user|>": True,
    "<|assistant|>": True,
    "<|end|>": True,
}  # those that take in what follows


@pytest.fixture
def folder(tmp_path):
    """A folder as Phi 3's, but for its `tokenizer.json`."""
    path = tiny_tokenizer_folder(tmp_path / "phi3")
    added = {
        str(i): {"content": tag, "lstrip": False, "rstrip": rstrip, "normalized": False, "special": True}
        for i, (tag, rstrip) in enumerate(TAGS.items(), start=400)
    }
    config = {"added_tokens_decoder": added, "eos_token": "<|endoftext|>", "bos_token": "<s>"}
    config["chat_template"] = (FOLDER / "chat_templates" / "phi3.jinja").read_text("utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_white_space_behind_a_tag_belongs_to_it(folder):
    tokenizer = load_tokenizer(str(folder), "chat")
    ids = encode_prompt(tokenizer, TURNS[:1], "chat")
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|user|>", "▁H", "i", "<|end|>", "<|assistant|>"]
    assert tokenizer.eos_token == "<|endoftext|>" and turn_end(tokenizer, "chat").ids == (403,)


def test_an_exported_folder_gives_the_same_ids(folder, tmp_path):
    tokenizer = load_tokenizer(str(folder), "chat")
    ids, mask = encode_dialogue(tokenizer, TURNS, "chat")
    save_tokenizer(tokenizer, tmp_path / "out")
    again = load_tokenizer(str(tmp_path / "out"), "chat")
    assert encode_dialogue(again, TURNS, "chat") == (ids, mask)
    assert (again.eos_token, again.chat_template) == (tokenizer.eos_token, tokenizer.chat_template)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    rendered = theirs.apply_chat_template(TURNS[:1], tokenize=False, add_generation_prompt=True)
    assert theirs.encode(rendered, add_special_tokens=False) == encode_prompt(tokenizer, TURNS[:1], "chat")


def test_of_several_chat_templates_the_default_one_is_taken(folder):
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": config["chat_template"]}]
    file.write_text(json.dumps(config | {"chat_template": named}))
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.chat_template == config["chat_template"] and template_of(tokenizer) == "chat"
    file.write_text(json.dumps(config | {"chat_template": named[:1]}))
    with pytest.raises(UserError, match="several chat templates, none of them named default"):
        load_tokenizer(str(folder))


def test_a_template_that_cannot_be_rendered_is_an_error_of_the_user(folder):
    tokenizer = load_tokenizer(str(folder), "chat", {"name": 3})
    tokenizer.chat_template = "{{ messages[0]['content'] + name }}"
    with pytest.raises(UserError, match=r"refuses a dialogue .*--chat_template_kwargs"):
        encode_prompt(tokenizer, TURNS[:1], "chat")
