"""Bad input of `python -m sft.train`: one line that names flag or file:line and what to do, exit code 2, no trace."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sft.train import main
from tests.tiny import tiny_llama_folder
from tests.tiny_run import SIZES, write_json
from utils.engine import init_distributed

DIALOGUES = [[f"Question {i}?", f"Answer {i}."] for i in range(8)]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    init_distributed()  # DeepSpeed speaks when it is first used
    return tiny_llama_folder(tmp_path_factory.mktemp("base"), **SIZES)


@pytest.fixture
def refused(base, tmp_path, capfd):
    """Asserts that a run is refused in one line before anything is written; gives that line."""

    def check(**changes) -> str:
        data, out = write_json(tmp_path / "good.json", DIALOGUES), tmp_path / "out"
        values = {
            "hf_model_name_or_path": base, "data_path": data, "model_save_path": out, "dtype": "fp32",
            "train_steps": 1, "warmup_steps": 1, "batch_size": 4, "context_truncate": 64, "num_valid": 2,
        } | changes  # fmt: skip
        argv = [word for name, value in values.items() for word in (f"--{name}", *str(value).split())]
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        assert stopped.value.code == 2
        error = capfd.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert not out.exists()
        return error

    return check


FLAGS = {
    "no such flag": ({"learning_rate": 1}, "unrecognized.*--learning_rate"),
    "no model": ({"hf_model_name_or_path": "/nowhere"}, "/nowhere does not exist; give"),
    "no data": ({"data_path": ""}, "--data_path.*expected at least one argument"),
    "data that are not there": ({"data_path": "/nowhere"}, "--data_path: /nowhere does not exist; give"),
    "hub data offline": ({"data_path": "someone/dialogues"}, "--data_path.*someone/dialogues.*download it first"),
    "a step of more than there is": ({"batch_size": 7}, "6 dialogues to train on are fewer than --batch_size 7; add"),
    "all held out": ({"num_valid": 8}, "--data_path .*8 usable dialogues are too few to hold out 8.*hold out fewer"),
    "too short a window": ({"context_truncate": 3}, "--data_path .*no dialogue.*--context_truncate 3; raise it"),
    "a window beyond the model's": ({"context_truncate": 600}, "--context_truncate 600 is longer.*give at most 512"),
    "no warm-up": ({"warmup_steps": 0}, "--warmup_steps 0: give at least 1"),
    "no answer tokens": ({"maxlen_res": 0}, "--maxlen_res 0: give a number at least 1"),
    "a weight too many": (
        {"data_weights": "1 2"},
        "--data_weights gives 2 weights for 1 of --data_path: give one each",
    ),
    "a weight of 0": ({"data_weights": "0"}, "--data_weights 0: give positive numbers"),
    "a negative weight": ({"data_weights": "-1"}, "--data_weights -1: give positive numbers"),
    "a weight that is no number": ({"data_weights": "nan"}, "--data_weights nan: give positive numbers"),
    "an infinite weight": ({"data_weights": "inf"}, "--data_weights inf: give positive numbers"),
    "not true or false": ({"packing": "perhaps"}, "--packing.*perhaps"),
    "bf16 without ZeRO": ({"zero_stage": 0, "dtype": "bf16"}, "--zero_stage 0.*--dtype fp32"),
    "no chat template": ({"template": "chat"}, "--template chat.*use --template moss_en"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags(refused, case):
    changes, pattern = FLAGS[case]
    assert re.search(pattern, refused(**changes))


DATA = {
    "broken JSON": ("x.json", b'[["a", "b"],\n["b"\n', "x.json:3: broken JSON.*mend"),
    "not UTF-8": ("x.jsonl", b'["a", "b"]\n["caf\xe9"]\n', "x.jsonl:2: not UTF-8.*save"),
    "empty file": ("x.json", b"", "--data_path.*x.json is empty"),
    "no answers": ("x.json", b'[["a"], ["b"]]', "no usable dialogues.*2 dropped: no answer.*x.json:1"),
    "an empty answer": ("x.json", b'[\n["a", " "]]', "no usable dialogues.*an empty turn.*x.json:2"),
    "a role twice": (
        "x.jsonl",
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}',
        "no usable dialogues.*two turns of the human in a row.*x.jsonl:1",
    ),
    "a turn out of order": (
        "x.jsonl",
        b'{"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]}',
        "no usable dialogues.*the assistant speaks first.*x.jsonl:1",
    ),
    "an unknown form": ("x.json", b'[{"text": "a"}]', "no usable dialogues.*none of the keys messages.*x.json:1"),
    "an unknown ending": ("x.txt", b"a", "--data_path.*unknown ending '.txt'; use"),
}


@pytest.mark.parametrize("case", DATA)
def test_data(refused, tmp_path, case):
    name, content, pattern = DATA[case]
    (tmp_path / name).write_bytes(content)
    assert re.search(pattern, refused(data_path=tmp_path / name))


def test_one_bad_path_of_two(refused, tmp_path):
    good = write_json(tmp_path / "a.json", DIALOGUES)
    assert re.search("--data_path: /nowhere does not exist", refused(data_path=f"{good} /nowhere"))
    long = write_json(tmp_path / "b.json", [["word " * 80, "Yes."]] * 3)
    error = refused(data_path=f"{good} {long}", data_weights="1 1")
    assert re.search("--data_path .*b.json: no dialogue is short enough for --context_truncate 64; raise it", error)
    error = refused(data_path=f"{good} {good}", data_weights="1 0.0001")
    assert re.search("--data_weights 0.0001: .*none below a thousandth of their sum", error)


def test_weights_that_are_damaged_or_not_finite(refused, base, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(base, model)
    weights = model / "model.safetensors"
    state = load_file(weights)
    state["model.norm.weight"][0] = torch.nan
    save_file(state, weights, metadata={"format": "pt"})
    assert re.search("not finite.*give an earlier checkpoint", refused(hf_model_name_or_path=model))
    weights.write_bytes(weights.read_bytes()[:20000])
    assert re.search("model.safetensors.*copy it again", refused(hf_model_name_or_path=model))


def test_a_model_that_would_mix_packed_dialogues(refused, monkeypatch):
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda _: None)
    assert re.search("--packing True: LlamaForCausalLM would .*; give --packing False", refused())
