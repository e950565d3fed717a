"""Model cards of real runs, and uploads to a hub on this machine: what arrives works elsewhere, and is not private."""

import getpass
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import reward.score
from data.template import encode_dialogue, encode_prompt
from reward.train import main as train_reward
from sft.train import main as train_sft
from tests.helpers.families import FAMILIES, family_config, family_tokenizer
from tests.helpers.hub import READ_TOKEN, TOKEN, running
from tests.helpers.tiny_run import clean_environment, fit_flags, read_lines, refusal, run_flags, run_module, write_json
from train_ppo import main as train_ppo
from utils.models.card import ANSWER, LICENSE, QUESTION
from utils.push_to_hub import main as push
from utils.run.export import export_model
from utils.run.index import INDEX
from utils.tokenizer import load_tokenizer, template_of

LORA = {"lora_rank": 4, "lr": 1e-2, "export": "both"}
IDS = torch.arange(3, 40)[None]
TURNS = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
FOLDERS = [
    f"{run}/{name}{end}" for run in ("sft", "reward", "ppo") for name in ("best", "final") for end in ("", "_adapter")
]


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A chat model whose template takes an argument, and writes a line break behind the end of a turn."""
    folder, family = tmp_path_factory.mktemp("chat") / "model", FAMILIES["ChatML, a base model's EOS"]
    tokenizer = family_tokenizer(family)
    tokenizer.chat_template = "{{ mood or '' }}" + tokenizer.chat_template
    with torch.random.fork_rng():
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(family_config(family, len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(inputs, chat, tmp_path_factory):
    """Folders of three runs with adapters: sft (chat template), reward (centered) and ppo (moss_en)."""
    folder = tmp_path_factory.mktemp("runs")
    pairs = [{"prompt": f"Number {i}?", "chosen": "good good", "rejected": "bad"} for i in range(12)]
    data = write_json(folder / "pairs.json", pairs)
    mood = {"chat_template_kwargs": '{"mood": "glad"}'}
    train_sft(fit_flags(chat, inputs.dialogues, folder / "sft", num_samples=0, **LORA, **mood))
    train_reward(fit_flags(chat, data, folder / "reward", center_scores=True, **LORA))
    train_ppo(run_flags(inputs, folder / "ppo", **LORA))
    return folder


def code_of(folder: Path) -> str:
    """The Python of a folder's card."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text("utf-8"), re.S)
    return code


def executed(folder: Path) -> dict:
    """The variables of a card's Python after it has run, with the folder as its place."""
    code, variables = code_of(folder).replace('"OWNER/NAME"', repr(str(folder))), {}
    assert str(folder) in code
    exec(code, variables)
    return variables


@pytest.mark.parametrize("name", FOLDERS)
def test_a_card_says_what_was_measured(runs, name):
    run, is_adapter = runs / name.split("/")[0], name.endswith("_adapter")
    card = ModelCard.load(runs / name / "README.md")
    assert card.data.library_name == ("peft" if is_adapter else "transformers")
    assert card.data.pipeline_tag == ("text-classification" if run.name == "reward" else "text-generation")
    assert card.data.license == "other" and not card.data.base_model
    assert ("Here is an adapter of its base." in card.text) == is_adapter
    (step,) = re.findall(r"Step (\d+), on held-out data", card.text)
    row = next(row for row in read_lines(run / "metrics.jsonl") if row["step"] == int(step))
    held_out = [f"{value:.4g}" for key, value in row.items() if key.startswith("eval_") and value is not None]
    table = card.text.split("held-out data:")[1].split("##")[0]
    assert re.findall(r"\| ([^|]*) \|\n", table + "\n")[2:] == held_out
    drawn = "/final" in name and find_spec("utils.report") is not None
    assert ("](curves.png)" in card.text) == drawn == (runs / name / "curves.png").is_file()
    assert "| `--lora_rank` | 4 |\n" in card.text and "`--model_save_path`" not in card.text


@pytest.mark.parametrize("name", ["sft/final", "sft/best_adapter", "ppo/final_adapter", "ppo/best"])
def test_the_code_of_a_card_prompts_as_the_training_did(runs, name):
    found, tokenizer = executed(runs / name), load_tokenizer(str(runs / name))
    tokenizer.chat_template_kwargs = {"mood": "glad"} if name.startswith("sft") else {}
    ids = encode_prompt(tokenizer, TURNS[:1], template_of(tokenizer))
    assert found["inputs"]["input_ids"].tolist() == [ids] and isinstance(found["answer"], str)
    assert (template_of(tokenizer), "glad" in tokenizer.decode(ids)) == (
        ("chat", True) if name.startswith("sft") else ("moss_en", False)
    )
    assert found["output"][0, : len(ids)].tolist() == ids and len(found["output"][0]) > len(ids)


@pytest.mark.parametrize("name", ["reward/final", "reward/final_adapter"])
def test_the_code_of_a_card_scores_as_the_toolkit_does(runs, name, tmp_path):
    found, tokenizer = executed(runs / name), load_tokenizer(str(runs / name))
    assert found["inputs"]["input_ids"].tolist() == [encode_dialogue(tokenizer, TURNS, "chat")[0]]
    write_json(tmp_path / "in.json", [[QUESTION, ANSWER]])
    out = tmp_path / "out.jsonl"
    words = ["--model", runs / name, "--input", tmp_path / "in.json", "--output", out, "--dtype", "fp32"]
    reward.score.main(list(map(str, words)))
    (row,) = read_lines(out)
    center = json.loads((runs / name / "config.json").read_text())["score_center"]
    assert found["score"] == pytest.approx(row["score"], abs=1e-5) and abs(center) > 1e-3


def private_words(*folders: Path) -> list[str]:
    """What must not be found in a published folder."""
    return [*map(str, folders), "/tmp/", socket.gethostname() + "/", f"/{getpass.getuser()}/", TOKEN]


def private(folder: Path, words: list[str]) -> list[tuple[str, str]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 3
    return [(path.name, word) for path in files for word in words if word.encode() in path.read_bytes()]


@pytest.mark.parametrize("name", FOLDERS)
def test_exported_folders_hold_nothing_private(runs, name, inputs, chat):
    """But for the base of an adapter, which has to be found; an upload names it by its id."""
    found = private(runs / name, private_words(runs, inputs.policy.parent, chat.parent, Path.cwd()))
    assert {file for file, _ in found} <= ({"adapter_config.json"} if name.endswith("_adapter") else set())


def test_a_users_card_is_kept(inputs, tmp_path):
    """Beside the model of a run of an older version, which wrote none."""
    out = tmp_path / "run"
    argv = fit_flags(inputs.policy, inputs.dialogues, out, train_steps=1, num_samples=0)
    train_sft(argv)
    index = json.loads((out / INDEX).read_text())
    index["names"]["final"].remove("README.md")
    write_json(out / INDEX, index)
    for name in ("final", "best"):
        (out / name / "README.md").write_text("mine")
    train_sft([*argv, "--overwrite"])
    assert (out / "final" / "README.md").read_text() == "mine"
    card = out / "best" / "README.md"
    assert "# run" in card.read_text()
    filled = card.read_text().replace(LICENSE, "license: mit")
    card.write_text(filled)
    (out / "final" / "README.md").write_text(f"a new card\n{LICENSE}\n")
    assert export_model(str(out), "best", lambda folder: shutil.copytree(out / "final", folder)) is None
    assert card.read_text() == filled


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that this process uses, with a token that may write."""
    with running(tmp_path / "hub") as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def elsewhere(hub, monkeypatch, target: str) -> torch.Tensor:
    """Runs the Python of an uploaded card as it is, where ids are folders, and returns the model's logits."""
    variables = {}
    monkeypatch.chdir(hub.folder)
    exec(code_of(hub.folder / target), variables)
    return variables["model"](IDS).logits


def test_a_run_uploads_its_final_model_which_works_elsewhere(inputs, hub, tmp_path, monkeypatch, capsys):
    out, target = tmp_path / "run", "someone/policy"
    base = shutil.copytree(inputs.policy, tmp_path / "secret_base")
    settings = json.loads((base / "config.json").read_text()) | {"_name_or_path": str(base), "vocab_file": str(base)}
    write_json(base / "config.json", settings)
    train_ppo(run_flags(inputs, out, policy_model_path=base, push_to_hub=target))
    assert f"uploaded: {hub.address}/{target}\n" in capsys.readouterr().out and hub.models == {target: True}
    arrived = hub.folder / target
    assert {path.name for path in arrived.iterdir()} == {path.name for path in (out / "final").iterdir()}
    assert private(arrived, private_words(tmp_path, inputs.policy.parent)) == []
    assert ModelCard.load(arrived / "README.md").text.count(target) == 1
    logits = elsewhere(hub, monkeypatch, target)
    own = AutoModelForCausalLM.from_pretrained(out / "final")
    torch.testing.assert_close(logits, own(IDS).logits)


def test_an_adapter_goes_with_the_id_of_its_base(runs, chat, hub, tmp_path, monkeypatch, capfd):
    folder = shutil.copytree(runs / "reward" / "final_adapter", tmp_path / "adapter")
    (folder / "notes.txt").write_text("of the user")
    (folder / "config.bak").write_text("of the user")
    assert "adapter of a local model, model, which" in refusal(push, [str(folder), "lab/adapter"], capfd)
    assert hub.models == {}
    push([str(chat), "lab/base", "--public"])
    push([str(folder), "lab/adapter", "--base_model", "lab/base"])
    said = capfd.readouterr().out
    assert "not uploaded: config.bak, notes.txt\n" in said and "names no license yet" in said
    assert hub.models == {"lab/base": False, "lab/adapter": True}
    arrived = hub.folder / "lab" / "adapter"
    assert private(arrived, private_words(tmp_path, runs, chat.parent)) == []
    assert ModelCard.load(arrived / "README.md").data.base_model == "lab/base"
    logits = elsewhere(hub, monkeypatch, "lab/adapter")
    own = AutoModelForSequenceClassification.from_pretrained(runs / "reward" / "final")
    torch.testing.assert_close(logits, own(IDS).logits)


def test_what_cannot_be_uploaded_is_said_before_the_training(inputs, hub, tmp_path, monkeypatch, capfd):
    hub.models["lab/public"] = False
    monkeypatch.setenv("HF_HOME", str(tmp_path))  # no stored token

    def told(target: str, token: str = TOKEN, **changes) -> str:
        monkeypatch.setenv("HF_TOKEN", token)
        return refusal(train_ppo, run_flags(inputs, tmp_path / "run", push_to_hub=target, **changes), capfd)

    assert "--push_to_hub model: it is not OWNER/NAME" in told("model")
    assert "--push_to_hub a/b--c: Cannot have -- or .. in repo_id" in told("a/b--c")
    assert "the token is of someone; use one of someone, lab as owner" in told("other/model")
    assert "the token can only read" in told("lab/model", READ_TOKEN)
    assert "(401: Invalid user token." in told("lab/model", "hf_wrong")
    assert "there already, and public" in told("lab/public")
    assert "adapter of a local model, policy" in told("lab/model", **LORA | {"export": "adapter"})
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "there is no token; run hf auth login" in told("lab/model", "")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot reach http://127.0.0.1:9" in told("lab/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "--push_to_hub lab/model: HF_HUB_OFFLINE=1 forbids the network" in told("lab/model")
    assert not os.path.exists(tmp_path / "run" / "metrics.jsonl")
    assert {method for method, _ in hub.requests} == {"GET"}


def test_a_refused_upload_is_a_warning(inputs, hub, tmp_path, capfd):
    hub.refuses = "/commit/"
    out = tmp_path / "my run"
    words = {"push_to_hub": "lab/model", "hub_private": "false", "train_steps": 1, "num_samples": 0}
    train_sft(fit_flags(inputs.policy, inputs.dialogues, out, **words))
    (line,) = (line for line in capfd.readouterr().out.splitlines() if line.startswith("warning: "))
    assert line.startswith(f"warning: --push_to_hub lab/model: {hub.address} refuses it (403: ")
    assert line.endswith(f"To upload it later: python -m utils.push_to_hub '{out}/final' lab/model --public")
    assert (out / "final" / "model.safetensors").is_file()
    assert "holds no model" in refusal(push, [str(out), "lab/model"], capfd)


@pytest.mark.slow
def test_processes_upload_and_download(runs, tmp_path):
    """The commands as they are typed, and the code of the card, which reads the files from the hub."""
    (tmp_path / "elsewhere").mkdir()
    with running(tmp_path / "hub") as hub:
        places = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
        settings = places | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
        result = run_module("utils.push_to_hub", runs / "sft" / "final", "lab/model", **settings)
        assert (result.returncode, hub.models) == (0, {"lab/model": True}), result.stderr
        code = f"{code_of(hub.folder / 'lab' / 'model')}\ntorch.save(model(inputs['input_ids']).logits, 'logits')"
        result = subprocess.run(
            [sys.executable, "-c", f"import torch\n{code}"], cwd=tmp_path / "elsewhere",
            env=clean_environment() | settings, capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        asked = [path for method, path in hub.requests if method == "GET" and path.startswith("/lab/model/resolve/")]
        assert any(path.endswith("/model.safetensors") for path in asked)
    found = executed(runs / "sft" / "final")
    expected = found["model"](found["inputs"]["input_ids"]).logits
    torch.testing.assert_close(torch.load(tmp_path / "elsewhere" / "logits"), expected)
