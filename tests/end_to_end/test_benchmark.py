"""ppo.benchmark on a tiny local task, as a user types it: numbers against those worked out from the model's logits."""

import importlib.util
import json
import math
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from data.template import encode_prompt
from ppo.benchmark import compare, is_mean, main, paired_difference, render
from ppo.benchmark_flags import BenchmarkConfig
from tests.helpers.tiny_run import as_argv, refusal, run_module
from utils.tokenizer import load_tokenizer

QUESTIONS = [
    ("Is tea hot?", ["Yes", "No"], 0), ("Name a tree.", ["Oak", "Rain", "<script>"], 2), ("Help  me\n", ["A", "B"], 1),
    ("What is a comet?", ["A star", "Ice"], 1), ("Count to five.", ["One two", "Six"], 0),
]  # fmt: skip
CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc}}]
"""


def write_task(folder: Path, name: str = "own_choice", file: str = "") -> Path:
    """A folder with a multiple-choice task of QUESTIONS."""
    folder.mkdir(exist_ok=True)
    rows = [{"question": q, "choices": c, "label": label} for q, c, label in QUESTIONS]
    data = folder / "items.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(CHOICE.format(name=name, file=file or data))
    return folder


def flags(inputs, **changes) -> list[str]:
    return as_argv({"models": [inputs.policy, inputs.other_policy], "dtype": "fp32"} | changes)


def test_paired_difference_by_hand():
    """Differences 1, -1, 1, 0: mean 1/4, variance (9 + 25 + 9 + 1) / 48; half of the interval: 1.96 / 2 deviations."""
    half = 1.96 * math.sqrt(44 / 48) / 2
    assert paired_difference([0, 1, 0, 0], [1, 0, 1, 0]) == pytest.approx([0.25, 0.25 - half, 0.25 + half])
    assert paired_difference([0], [1]) is None
    assert is_mean(0.25, [0, 1, 0, 0]) and not is_mean(math.exp(0.25), [0, 1, 0, 0])


def test_metrics_that_are_no_means_have_no_difference():
    side = {"results": {"t\x1b[2J": {"ppl": [2.0, None]}}, "items": {"t\x1b[2J": {"ppl": [0.5, 0.7]}}}
    (row,) = compare(side, side)
    assert row["difference"] is None and "items" not in row
    assert render([row], BenchmarkConfig(models=["a", "b"], tasks=["t"])).endswith("ppl     2.0000  2.0000")


def test_one_model_is_too_few(inputs):
    """Said without lm-eval, and before torch is imported."""
    done = run_module("ppo.benchmark", *flags(inputs, tasks="x", models=inputs.policy))
    assert done.returncode == 2 and "--models has 1 values: pass two" in done.stderr


@pytest.mark.parametrize("given", ["", "0"])
def test_metrics_are_downloaded_if_data_are(given, inputs, tmp_path, monkeypatch, capfd):
    """Two switches of two libraries; the message names the first. Nothing is downloaded by default."""
    for name in ("HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
        monkeypatch.setenv(name, "")  # so that what main sets is taken back
        monkeypatch.delenv(name)
    if given:
        monkeypatch.setenv("HF_DATASETS_OFFLINE", given)
    assert "is a folder" in refusal(main, flags(inputs, tasks="x", output=tmp_path), capfd)
    assert os.environ["HF_EVALUATE_OFFLINE"] == os.environ["HF_DATASETS_OFFLINE"] == (given or "1")


@pytest.fixture
def lm_eval():
    """Skips a test where lm-eval is missing. In CI it fails."""
    if importlib.util.find_spec("lm_eval") is None:
        stop = pytest.fail if os.environ.get("CI") else pytest.skip
        stop("needs lm-eval: source utils/setup.sh lm-eval")


@torch.no_grad()
def by_hand(folder: Path, template: str, question: str, choices: list[str]) -> list[float]:
    """log p(choice | prompt) under the model, one forward each."""
    tokenizer, model = load_tokenizer(str(folder), template), AutoModelForCausalLM.from_pretrained(folder)
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": question}], template)
    scores = []
    for choice in choices:
        ids = tokenizer.encode(tokenizer.decode(prompt) + choice, add_special_tokens=False)
        assert ids[: len(prompt)] == prompt
        logprobs = model(torch.tensor([ids])).logits.log_softmax(-1)[0]
        scores.append(sum(float(logprobs[t - 1, ids[t]]) for t in range(len(prompt), len(ids))))
    return scores


@pytest.mark.slow
def test_numbers_are_those_of_the_models_logits(inputs, tmp_path, capsys, lm_eval):
    """Two runs at different batch sizes give the items' accuracies that follow from the logits of single forwards."""
    task, output = write_task(tmp_path / "tasks"), tmp_path / "out.json"
    for size in (1, 3):
        main(flags(inputs, tasks="own_choice", task_path=task, output=output, batch_size=size))
        found = json.loads(output.read_text("utf-8"))
        for side, folder in (("before", inputs.policy), ("after", inputs.other_policy)):
            hits = []
            for question, choices, label in QUESTIONS:
                scores = by_hand(folder, "moss_en", question, choices)
                hits.append(float(max(range(len(scores)), key=scores.__getitem__) == label))
            assert found["items"][side]["own_choice"]["acc"] == hits
            number, error = found["table"][0][side]
            p = sum(hits) / len(hits)
            assert number == pytest.approx(p)
            assert error == pytest.approx(math.sqrt(p * (1 - p) / (len(hits) - 1)))
    assert f"before: {inputs.policy}, after: {inputs.other_policy}" in capsys.readouterr().out


@pytest.mark.slow
def test_user_mistakes_are_one_line(inputs, tmp_path, capfd, lm_eval):
    task = write_task(tmp_path / "tasks")
    line = refusal(main, flags(inputs, tasks=["own_choice", "no_such_task"], task_path=task), capfd)
    assert f"--tasks no_such_task: not in --task_path {task}, which has own_choice" in line
    write_task(tmp_path / "gone", file="/nowhere/items.jsonl")
    line = refusal(main, flags(inputs, tasks="own_choice", task_path=tmp_path / "gone"), capfd)
    assert "own_choice: cannot be loaded" in line and "must be on this machine" in line
    line = refusal(main, flags(inputs, tasks="own_choice", task_path=task, models=[inputs.policy, "/nowhere"]), capfd)
    assert "--models" in line and "/nowhere" in line
    models = [inputs.policy, inputs.reward]
    line = refusal(main, flags(inputs, tasks="own_choice", task_path=task, models=models), capfd)
    assert f"--models {inputs.reward} is a reward model or critic" in line


@pytest.mark.slow
def test_adapters_and_limit(inputs, tmp_path, lm_eval):
    """An adapter's folder is a model; without the template and with --limit, the first items in plain text."""
    from sft.train import main as train_sft
    from tests.helpers.tiny_run import fit_flags

    train_sft(fit_flags(inputs.policy, inputs.dialogues, tmp_path / "sft", export="adapter", lora_rank=2, lr=1e-1))
    output = tmp_path / "out.json"
    more = {"task_path": write_task(tmp_path / "tasks"), "tasks": "own_choice", "limit": 3, "apply_template": False}
    main(flags(inputs, models=[inputs.policy, tmp_path / "sft" / "final"], output=output, **more))
    found = json.loads(output.read_text("utf-8"))
    assert found["table"][0]["items"] == 3 and len(found["items"]["after"]["own_choice"]["acc"]) == 3
