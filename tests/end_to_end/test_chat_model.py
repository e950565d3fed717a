"""A chat model through all commands, without a flag that names its template."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ppo.compare
import reward.evaluate
import reward.score
import reward.train
import sft.train
import train_ppo
from tests.helpers.families import FAMILIES, family_config, family_tokenizer
from tests.helpers.tiny_run import PROMPTS, as_argv, fit_flags, read_lines, refusal, run_flags, write_json

FAMILY = FAMILIES["ChatML, a base model's EOS"]
SETTINGS = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05}
FIT = {"train_steps": 1, "num_valid": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder as one downloads it: ChatML, EOS <|endoftext|>, settings of generation."""
    folder, tokenizer = tmp_path_factory.mktemp("chat") / "model", family_tokenizer(FAMILY)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(family_config(FAMILY, len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / "generation_config.json", SETTINGS | {"eos_token_id": tokenizer.eos_token_id})
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Files of dialogues and preferences."""
    folder = tmp_path_factory.mktemp("data")
    dialogues = [[prompt[0], f"Fine question {i}."] for i, prompt in enumerate(PROMPTS)]
    write_json(folder / "dialogues.json", dialogues)
    write_json(folder / "pairs.json", [{"prompt": q, "chosen": a, "rejected": "No."} for q, a in dialogues])
    return folder


@pytest.fixture(scope="module")
def judge(model, data, tmp_path_factory):
    """A reward model trained from it."""
    out = tmp_path_factory.mktemp("judge") / "run"
    reward.train.main(fit_flags(model, data / "pairs.json", out, **FIT, reward_lm_loss_factor=1))
    return out / "final"


def assert_chat(text: str) -> None:
    """The command has said which template, what ends an answer, and what the model sees."""
    assert ": template chat, the tokenizer's own chat template" in text
    assert "'<|im_end|>' (311: the template's end of a turn" in text and "'<|endoftext|>' (309: EOS" in text
    assert r'first prompt as the model sees it: "<|im_start|>user\n' in text


def assert_kept(folder, model) -> None:
    """Template, byte by byte, and settings of generation are the source's; the ids are those that end an answer."""
    assert (folder / "chat_template.jinja").read_bytes() == (model / "chat_template.jinja").read_bytes()
    generation = json.loads((folder / "generation_config.json").read_text())
    assert {key: generation[key] for key in SETTINGS} == SETTINGS
    assert generation["eos_token_id"] == [309, 311]
    assert {"max_new_tokens", "max_length"}.isdisjoint(generation)


def test_sft(model, data, tmp_path, capsys):
    sft.train.main(fit_flags(model, data / "dialogues.json", tmp_path / "run", **FIT, num_samples=1))
    assert_chat(capsys.readouterr().out)
    assert_kept(tmp_path / "run" / "final", model)
    (row,) = read_lines(tmp_path / "run" / "samples.jsonl")
    assert row["prompt"].endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert row["reference"].startswith("Fine question")


def test_reward_model(model, data, judge, capsys):
    assert AutoTokenizer.from_pretrained(judge).chat_template == AutoTokenizer.from_pretrained(model).chat_template
    reward.evaluate.main(as_argv({"model": judge, "data_path": data / "pairs.json", "dtype": "fp32"}))
    assert_chat(capsys.readouterr().out)
    reward.score.main(as_argv({"model": judge, "input": data / "dialogues.json", "dtype": "fp32"}))
    assert_chat(capsys.readouterr().err)


def test_ppo_and_its_comparison(model, judge, inputs, tmp_path, capsys):
    changes = {"policy_model_path": model, "critic_model_path": judge, "train_steps": 1, "maxlen_prompt": 120}
    train_ppo.main(run_flags(inputs, tmp_path / "run", **changes))
    assert_chat(capsys.readouterr().out)
    assert_kept(tmp_path / "run" / "final", model)
    flags = {
        "policies": [model, tmp_path / "run" / "final"], "reward_model_path": judge, "data_path": inputs.prompts,
        "dtype": "fp32", "maxlen_prompt": 120, "maxlen_res": 12,
    }  # fmt: skip
    ppo.compare.main(as_argv(flags))
    assert_chat(capsys.readouterr().out)


def test_models_of_two_templates_are_not_mixed(judge, inputs, tmp_path, capfd):
    error = refusal(train_ppo.main, run_flags(inputs, tmp_path / "run", critic_model_path=judge), capfd)
    assert f"--critic_model_path {judge} was trained with the template chat" in error  # the policy has none
    assert not (tmp_path / "run").exists()
