"""Which template and stop ids a command uses, the reason for it, and what it refuses."""

import json

import pytest

from data.chat import TurnEnd, turn_end
from data.choose_template import prepare_tokenizer
from data.template import encode_dialogue, encode_prompt
from ppo.config import PPOConfig
from tests.helpers.families import FAMILIES, TURNS, family_tokenizer
from tests.helpers.tiny import tiny_llama, tiny_llama_folder
from tests.helpers.tiny_run import write_json
from utils.errors import UserError
from utils.tokenizer import load_tokenizer, save_tokenizer, template_of

PATHS = {"policy_model_path": "P", "critic_model_path": "C", "data_path": "D"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders: `plain` without chat template, `en` and `zh` with ours, `chat` and `other` with others."""
    folder = tmp_path_factory.mktemp("models")
    tiny_llama_folder(folder / "plain")
    for lang in ("en", "zh"):
        tiny_llama_folder(folder / lang, tokenizer=False)
        save_tokenizer(load_tokenizer(str(folder / "plain"), f"moss_{lang}"), folder / lang)
    for name, family in (("chat", "ChatML"), ("other", "Qwen 2.5")):
        tokenizer = family_tokenizer(FAMILIES["ChatML, a base model's EOS"])
        tokenizer.chat_template = family_tokenizer(FAMILIES[family]).chat_template
        tokenizer.save_pretrained(folder / name)
        tiny_llama(len(tokenizer), eos_token_id=0, bos_token_id=None).save_pretrained(folder / name)
    return folder


def of(folders, source: str, *others: str, **flags):
    """(template, tokenizer, printed lines) of a run with the tokenizer of `source` and the critics `others`."""
    said, config = [], PPOConfig(**PATHS, **flags)
    critics = [("--critic_model_path", str(folders / name)) for name in others]
    path = str(folders / source)
    tokenizer, template = prepare_tokenizer(config, path, [("--policy_model_path", path)], said.append, critics)
    assert template_of(tokenizer) == template
    return template, tokenizer, said


@pytest.mark.parametrize(
    ("source", "flags", "template", "why"),
    [
        ("chat", {"lang": "zh"}, "chat", "own chat template (--template auto)"),
        ("chat", {"template": "moss_en"}, "moss_en", "requested (--template moss_en)"),
        ("plain", {"lang": "zh"}, "moss_zh", "--lang zh"),
        ("en", {"lang": "zh"}, "moss_en", "own chat template (--template auto)"),
        ("zh", {"template": "chat"}, "moss_zh", "own chat template (--template chat)"),
    ],
)
def test_template_and_reason(folders, source, flags, template, why):
    found, _, said = of(folders, source, **flags)
    assert found == template
    assert said[0].startswith(f"{folders / source}: template {template}, ") and why in said[0]


def test_a_requested_template_replaces_the_tokenizers_own(folders):
    tokenizer = of(folders, "chat", template="moss_zh")[1]
    assert tokenizer.convert_tokens_to_ids("<|MOSS|>") >= 309
    assert tokenizer.decode(encode_prompt(tokenizer, TURNS[:1], "moss_zh")) == "<|Human|>Hi<|endoftext|><|MOSS|>"


@pytest.mark.parametrize(
    ("source", "other", "message"),
    [
        ("en", "zh", "C was trained with the template moss_zh, and this run uses .*--template moss_en or moss_zh$"),
        ("chat", "other", "C was trained with another chat template, and this run uses chat, .* --template chat$"),
    ],
)
def test_another_template_stops_a_run_unless_the_flag_is_explicit(folders, source, other, message):
    with pytest.raises(UserError, match=message.replace("C ", f"--critic_model_path {folders / other} ")):
        of(folders, source, other)
    template = "chat" if source == "chat" else "moss_en"
    assert of(folders, source, other, template=template)[0] == template
    assert of(folders, source, source)[0] == of(folders, source, "plain")[0] == template  # `plain` has none


def test_stop_ids_and_their_reasons(folders):
    file = folders / "chat" / "generation_config.json"
    eos, end, start = load_tokenizer(str(folders / "chat")).convert_tokens_to_ids(
        ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
    )
    write_json(file, {"eos_token_id": [eos, start, 99999]})  # the last is not in the vocabulary
    _, tokenizer, said = of(folders, "chat")
    assert tokenizer.stop_ids == (eos, start, end)
    assert f"({eos}: EOS, {file})" in said[1] and f"({start}: {file})" in said[1] and f"({end}: the template" in said[1]
    assert of(folders, "chat", template="moss_en")[1].stop_ids == (eos,)
    file.unlink()
    assert of(folders, "chat")[1].stop_ids == (eos, end)
    write_json(folders / "plain" / "generation_config.json", {"eos_token_id": [2, 5]})
    assert of(folders, "plain")[1].stop_ids == (2,)


def test_stop_token_replaces_all_others(folders):
    tokenizer = of(folders, "chat", stop_token=["<|im_start|>", "Ċ"])[1]  # as the vocabulary spells it
    assert sorted(tokenizer.convert_ids_to_tokens(tokenizer.stop_ids)) == ["<|im_start|>", "Ċ"]
    assert of(folders, "chat", stop_token=["\n"])[1].stop_ids == tokenizer.stop_ids[:1]  # as text


def test_arguments_reach_the_template_only(folders):
    tokenizer = of(folders, "chat", chat_template_kwargs=json.dumps({"enable_thinking": False}))[1]
    tokenizer.chat_template = "{% if enable_thinking is defined %}{{ 'set ' ~ enable_thinking }}{% endif %}"
    assert tokenizer.decode(encode_prompt(tokenizer, TURNS[:1], "chat")) == "set False"
    with pytest.raises(UserError, match=r"^--chat_template_kwargs: 'tokenize' is not an argument of a chat template"):
        of(folders, "chat", chat_template_kwargs='{"tokenize": true}')


def test_the_end_of_a_turn_follows_the_tokenizer(folders):
    tokenizer = of(folders, "chat")[1]
    end, newline, start = tokenizer.convert_tokens_to_ids(["<|im_end|>", "Ċ", "<|im_start|>"])
    assert turn_end(tokenizer, "chat") == TurnEnd((end, newline), end)
    assert turn_end(tokenizer, "moss_en") == turn_end(tokenizer, None) == TurnEnd((309,), 309)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + '<|im_start|>' }}{% endfor %}"
    assert turn_end(tokenizer, "chat") == TurnEnd((start,), start)


def test_reasoning_that_the_prompt_opens_is_not_opened_again():
    tokenizer = family_tokenizer(FAMILIES["DeepSeek R1"])
    turns = [TURNS[0], {"role": "assistant", "content": "<think>\nShort.\n</think>\n\nHello."}]
    text = tokenizer.decode(encode_dialogue(tokenizer, turns, "chat")[0])
    assert text.endswith("<｜User｜>Hi<｜Assistant｜><think>\nShort.\n</think>\n\nHello.<｜end▁of▁sentence｜>")
