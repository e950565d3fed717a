"""Configs, tokenizers and chat templates that cannot be right are refused in one line, with 2 GB and 20 s."""

import json
import shutil

import pytest
import torch

from data.chat import turn_end
from data.template import encode_prompt
from tests.helpers.tiny import tiny_llama_folder
from tests.helpers.tiny_run import write_json
from utils.errors import UserError
from utils.limits import limited
from utils.models.load import load_causal_lm
from utils.tokenizer import load_tokenizer, template_of

QUESTION = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_llama_folder(tmp_path_factory.mktemp("llama"))


def load(folder):
    with limited(20, 2 << 30):
        return load_causal_lm(str(folder), torch.float32, torch.device("cpu"), say=str, flag="--model")


CONFIGS = {
    "num_hidden_layers": [0, -1, 2000, 10**9, 10**30, float("nan"), "x"],
    "num_attention_heads": [0, -4, 3, 10**9, 1.5, [4]],
    "num_key_value_heads": [0, -1, 10**9], "head_dim": [0, 10**9, "x"],
    "hidden_size": [0, -64, 10**9, 2**31 - 1], "intermediate_size": [0, 10**9], "vocab_size": [0, -1, 10**9],
    "max_position_embeddings": [0, -1, 10**12], "num_labels": [10**12],
    "rms_norm_eps": [float("nan"), float("inf"), 1e30, "x"],
    "rope_parameters": [3, [], {"rope_theta": 0}, {"rope_theta": "x"}, {"rope_theta": float("nan")},
                        {"rope_type": "no"}, {"rope_type": "linear", "factor": 0}],
    "torch_dtype": ["garbage", "nn", 3, []], "architectures": ["x", 3, [3], {}], "auto_map": ["x", 3, []],
    "text_config": [3, [], {}, {"hidden_size": -1}], "quantization_config": [3, [], {"quant_method": 3}],
    "eos_token_id": [10**12, "x", [None], {}, True, 1.5], "pad_token_id": [400, 10**12],
    "is_encoder_decoder": [True], "model_type": [3, None, "t5", "\ud800"], "score_center": [10**400],
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in CONFIGS.items() for value in values])
def test_a_config_that_no_model_has(llama, tmp_path, key, value):
    folder = shutil.copytree(llama, tmp_path / "model")
    config = json.loads((llama / "config.json").read_text()) | {key: value}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"^--model:? {folder}[^\n]*$|^--model: [^\n]*{folder}[^\n]*$"):
        load(folder)


def test_the_largest_length_that_tokenizers_know(llama, tmp_path):
    """Published exports have it."""
    folder = shutil.copytree(llama, tmp_path / "model")
    config = json.loads((llama / "config.json").read_text()) | {"model_max_length": 1000000000000000019884624838656}
    (folder / "config.json").write_text(json.dumps(config))
    load(folder)


def test_a_config_of_a_far_larger_model_is_refused_before_memory_is_taken(llama, tmp_path):
    """Its 150 million parameters would fit the limit."""
    folder = shutil.copytree(llama, tmp_path / "model")
    config = json.loads((llama / "config.json").read_text()) | {"intermediate_size": 400_000}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json describes 1\.54e"):
        load(folder)


@pytest.mark.parametrize("content", [{"eos_token_id": [2, None]}, {"eos_token_id": 10**12}, {"x": "\ud800"}, [], None])
def test_a_generation_config_that_no_model_has(llama, tmp_path, content):
    folder = shutil.copytree(llama, tmp_path / "model")
    (folder / "generation_config.json").unlink()
    if content is None:
        (folder / "generation_config.json").mkdir()
    else:
        (folder / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"^--model: .*generation_config.json [^\n]*$"):
        load(folder)


def test_weights_that_are_no_floating_point_numbers(tmp_path, llama):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(llama, tmp_path / "model")
    file = folder / "model.safetensors"
    save_file({name: x.to(torch.int8) for name, x in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"^--model: .*\.weight is in int8, not in floating point"):
        load(folder)


def changed(content, path: str, value):
    """The JSON object with the value at a path of keys and places put in."""
    *above, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    place = content
    for part in above:
        place = place[part]
    place[last] = value
    return content


TOKENIZERS = {
    "tokenizer.json": {
        "model/vocab": [3, {"a": -1}, {"a": 10**9}, {"a": 1.5}], "model/merges": [["a"]], "model/type": ["no"],
        "added_tokens": [[3], 3], "added_tokens/0/id": [-1, 0, 10**9, 10**30, 1.5], "added_tokens/0/content": [3],
        "version": [3], "pre_tokenizer": [{}],
        "normalizer": [{"type": "Replace", "pattern": {"String": ""}, "content": "aa"},  # a panic
                       {"type": "Prepend", "prepend": "a" * 10**5}],
    },
    "tokenizer_config.json": {
        "added_tokens_decoder": [3, [], {"-1": {"content": "a"}}, {"1000000000": {"content": "a"}}, {"1": {}}],
        "auto_map": [3], "model_max_length": ["x"], "model_input_names": [3], "tokenizer_class": [3],
        "eos_token": [3, [], {"content": 3}], "chat_template": [3, {}, [{"name": [], "template": "x"}], ["x"]],
    },
}  # fmt: skip
CASES = [
    (file, path, value) for file, paths in TOKENIZERS.items() for path, values in paths.items() for value in values
]


@pytest.mark.parametrize(("file", "path", "value"), CASES)
def test_tokenizer_files_that_are_refused(chat_folder, tmp_path, file, path, value):
    folder = shutil.copytree(chat_folder, tmp_path / "tokenizer")
    if path == "chat_template":
        (folder / "chat_template.jinja").unlink()
    write_json(folder / file, changed(json.loads((folder / file).read_text()), path, value))
    with limited(20, 2 << 30), pytest.raises(UserError, match=rf"^--tokenizer_name_or_path: [^\n]*{folder}[^\n]*$"):
        load_tokenizer(str(folder))


def test_a_huge_id_is_refused_before_memory_is_taken(chat_folder, tmp_path):
    """The library takes 4 GB for an id of 10^9."""
    folder = shutil.copytree(chat_folder, tmp_path / "tokenizer")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["!"] = 10**9
    write_json(folder / "tokenizer.json", content)
    with limited(20, 2 << 30), pytest.raises(UserError, match=r"model\.vocab.*less than 10000000"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("value", [{"<a>": -1}, {"<a>": True}, {"<a>": 1.5}, {"<a>": 10**9}, {"<a>": 405}, 3])
def test_added_tokens_of_a_sentencepiece_model_that_are_refused(llama, tmp_path, value):
    folder = shutil.copytree(llama, tmp_path / "tokenizer")
    write_json(folder / "added_tokens.json", value)
    with limited(20, 2 << 30), pytest.raises(UserError, match=rf"^--tokenizer_name_or_path: [^\n]*{folder}[^\n]*$"):
        load_tokenizer(str(folder))


BODY = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
TEMPLATES = {
    "{{ 1 / 0 }}": "division", "{{ messages[0]['x'].y }}": "no attribute 'x'", "{% for %}": "", "{{ " + "(" * 500: "",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion", "{{ range(10**9) }}": "powers",
    "{{ range(1000000000) }}": "Range too big", "{{ (7 ** 99999999) | length }}": "powers",
    "{{ 'a' * 10000000000 }}": "MemoryError", "{{ 'a' | center(10000000000) }}": "MemoryError",
    "{{ '%9999999999d' | format(1) }}": "", "{% for i in range(30) %}{{ 'a' * 100000000 }}{% endfor %}": "MemoryError",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "more than",
    "{{ 'a' * 1000000 }}" + BODY: "it writes 1000014 characters", "{{ '\\ud800' }}" + BODY: "surrogates",
    " \n": "leaves out the question",
    "hello": "leaves out the question", "{{ messages[0].content }}": "leaves out answers",
}  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda text: text[:30])
def test_chat_templates_that_are_refused(chat_folder, template):
    tokenizer = load_tokenizer(str(chat_folder))
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=rf"^--template chat: [^\n]*{TEMPLATES[template]}[^\n]*$"):
        turn_end(tokenizer, "chat")


@pytest.mark.parametrize("places", ["a list in the config", "a folder beside the default one"])
def test_of_several_templates_of_a_fast_tokenizer_the_default_one_is_taken(chat_folder, tmp_path, places):
    folder = shutil.copytree(chat_folder, tmp_path / "tokenizer")
    expected, file = load_tokenizer(str(chat_folder)), folder / "chat_template.jinja"
    if places == "a list in the config":
        named = [{"name": "tool_use", "template": "{{ 1 / 0 }}"}, {"name": "default", "template": file.read_text()}]
        file.unlink()
        config = json.loads((folder / "tokenizer_config.json").read_text())
        write_json(folder / "tokenizer_config.json", config | {"chat_template": named})
    else:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ 1 / 0 }}")
    tokenizer = load_tokenizer(str(folder), "chat")
    assert template_of(tokenizer) == "chat" and tokenizer.chat_template == expected.chat_template
    assert encode_prompt(tokenizer, QUESTION, "chat") == encode_prompt(expected, QUESTION, "chat")


def test_special_tokens_of_a_template_are_not_split(chat_folder, tmp_path):
    folder = shutil.copytree(chat_folder, tmp_path / "tokenizer")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", config | {"split_special_tokens": True})
    expected = encode_prompt(load_tokenizer(str(chat_folder)), QUESTION, "chat")
    assert encode_prompt(load_tokenizer(str(folder)), QUESTION, "chat") == expected


def test_limits_are_taken_back():
    """After them, the process can take as much time and memory as before."""
    for name in ("time", "memory"):
        with pytest.raises((TimeoutError, MemoryError)), limited(0.05, 16 << 20):
            while name == "time":
                pass
            bytes(1 << 28)
    assert len(bytes(1 << 28)) == 1 << 28
    sum(range(10**7))
