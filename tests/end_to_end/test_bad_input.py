"""Bad input: one clear line that names flag or file:line and what to do, exit code 2, nothing left behind."""

import json
import re
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from reward.model import load_scalar_model, save_scalar_model
from tests.tiny import tiny_llama_folder, tiny_tokenizer_folder
from tests.tiny_run import PROMPTS, SIZES, run_flags, write_json
from train_ppo import main
from utils.engine import init_distributed
from utils.tokenizer import load_tokenizer

FLAGS = {
    "no such flag": ({"learning_rate": 1}, r"unrecognized.*--learning_rate 1 \(see --help"),
    "an abbreviation": ({"train_step": 1}, "unrecognized.*--train_step 1; did you mean --train_steps"),
    "not a number": ({"lr": "fast"}, "--lr.*fast"),
    "not a choice": ({"kl_estimator": "k4"}, "--kl_estimator.*k4.*k1"),
    "a path left out": ({"data_path": None}, "--data_path is missing"),
    "model folder": ({"policy_model_path": "/nowhere/model"}, "--policy_model_path.*/nowhere/model.*give"),
    "critic folder": ({"critic_model_path": "/nowhere/model"}, "--critic_model_path.*/nowhere/model.*give"),
    "reward folder": ({"reward_model_path": "/nowhere/model"}, "--reward_model_path.*/nowhere/model.*give"),
    "reward model twice": ({"reward_model_path": ["x", "y", "x"]}, "--reward_model_path names x twice: give"),
    "an ensemble of one": (
        {"reward_ensemble": "min"},
        "--reward_ensemble min needs several models: --reward_model_path",
    ),
    "a deviation that counts nothing": (
        {"reward_model_path": ["x", "y"], "reward_ensemble": "mean_minus_std", "ensemble_std_coef": 0},
        "--reward_ensemble mean_minus_std with --ensemble_std_coef 0 is the mean: give",
    ),
    "negative deviation": ({"ensemble_std_coef": -1}, "--ensemble_std_coef -1: give a number at least 0"),
    "unknown reward template": ({"reward_template": "alpaca"}, "--reward_template alpaca: choose from moss_en"),
    "too many reward templates": (
        {"reward_template": ["chat", "chat"]},
        "--reward_template has 2 values for 1 reward models: give one, or one each",
    ),
    "a reward tokenizer without a reward model": (
        {"reward_fn": "x.py:f", "reward_tokenizer_name_or_path": "x"},
        "--reward_tokenizer_name_or_path has 1 values for 0 reward models",
    ),
    "no reward tokenizer": (
        {"reward_tokenizer_name_or_path": "/nowhere/model"},
        "--reward_tokenizer_name_or_path: /nowhere/model does not exist; give",
    ),
    "tokenizer": ({"tokenizer_name_or_path": "/nowhere/model"}, "--tokenizer_name_or_path.*/nowhere/model.*give"),
    "data": ({"data_path": "/nowhere/data"}, "--data_path.*/nowhere/data.*give"),
    "hub data offline": ({"data_path": "someone/prompts"}, "--data_path.*someone/prompts.*download it first"),
    "hub model offline": ({"critic_model_path": "someone/model"}, "--critic_model_path.*someone/model.*download it"),
    "pretraining data left out": (
        {"use_ppo_pretrain_loss": True, "ppo_pretrain_loss_weight": 1},
        "give --ppo_pretrain_data_path",
    ),
    "response as long as the window": ({"maxlen_res": 80}, "--maxlen_res 80.*--maxlen_prompt 80.*raise"),
    "longer than the window": ({"maxlen_prompt": 513}, "--maxlen_prompt 513.*window.*512"),
    "prompts longer than their room": ({"maxlen_prompt": 14}, "--data_path.*no usable prompts.*--maxlen_prompt"),
    "batches that do not divide": ({"batch_size": 3}, "--num_rollouts 8.*multiple of --batch_size 3"),
    "no warm-up": ({"warmup_steps": 0}, "--warmup_steps 0: give at least 1"),
    "fewer prompts than a buffer": ({"num_rollouts": 12}, "--num_rollouts 12.*11.*--data_path.*lower"),
    "reward clip 0": ({"use_reward_clip": True, "reward_clip": 0}, "--use_reward_clip with --reward_clip 0.*give"),
    "advantage clip 0": ({"use_advantage_clip": True, "advantage_clip": 0}, "--use_advantage_clip.*give"),
    "policy clip 0": ({"use_policy_loss_clip": True, "pg_clip": 0}, "--use_policy_loss_clip with --pg_clip 0.*give"),
    "value clip 0": ({"use_critic_loss_clip": True, "value_clip": 0}, "--use_critic_loss_clip.*give"),
    "entropy bonus 0": ({"use_entropy_loss": True}, "--use_entropy_loss with --entropy_loss_weight 0.*give"),
    "pretraining weight 0": (
        {"use_ppo_pretrain_loss": True, "ppo_pretrain_data_path": "x"},
        "--use_ppo_pretrain_loss with --ppo_pretrain_loss_weight 0.*give",
    ),
    "entropy clip out of reach": (
        {"use_entropy_loss": True, "entropy_loss_weight": 1, "entropy_clip": 6},
        r"--entropy_clip 6.*ln\(400\) = 5.99",
    ),
    "negative learning rate": ({"lr": -0.1}, "--lr -0.1: give a number at least 0"),
    "not finite": ({"kl_penalty_weight": "nan"}, "--kl_penalty_weight nan: give"),
    "k1 in the loss": ({"kl_in": "loss"}, "--kl_in loss needs --kl_estimator k2 or k3"),
    "bf16 without ZeRO": ({"dtype": "bf16", "zero_stage": 0}, "--zero_stage 0.*--dtype fp32"),
    "unknown tracker": ({"report_to": "paper"}, "--report_to paper: choose from.*wandb"),
    "tracker that is not installed": ({"report_to": "aim"}, "--report_to aim: its package is not installed; pip"),
    "no file of the reward function": ({"reward_fn": "/nowhere.py:f"}, "--reward_fn /nowhere.py:f: give an existing"),
    "no chat template": ({"template": "chat"}, "--template chat.*use --template moss_en"),
}


@pytest.fixture(scope="module", autouse=True)
def deepspeed_has_spoken():
    """DeepSpeed builds its operators when it is first used, and a linker complains about those that it cannot."""
    init_distributed()


def error_of(argv: list[str], capfd, monkeypatch) -> str:
    """Runs train_ppo.py, which has to end with exit code 2, and gives its error output without the progress bar."""
    monkeypatch.setattr("utils.logger.tqdm", partial(tqdm, disable=True))
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    return capfd.readouterr().err


@pytest.fixture
def refused(inputs, tmp_path, capfd, monkeypatch):
    """Asserts that flags are refused in one line before anything is written; gives that line."""

    def check(**changes) -> str:
        out = tmp_path / "out"
        error = error_of(run_flags(inputs, out, **changes), capfd, monkeypatch)
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert not out.exists()
        return error

    return check


@pytest.mark.parametrize("case", FLAGS)
def test_flags(refused, case):
    changes, pattern = FLAGS[case]
    assert re.search(pattern, refused(**changes))


DATA = {
    "broken JSON": ("train.json", b'[["a"],\n["b"\n', "train.json:3: broken JSON.*mend"),
    "a list that is none": ("train.json", b'{"prompt": "a"}', "train.json:1: expected a list.*jsonl"),
    "not UTF-8": ("train.jsonl", b'["a"]\n["caf\xe9"]\n', "train.jsonl:2: not UTF-8.*save"),
    "empty file": ("train.json", b"", "--data_path.*train.json is empty"),
    "no records": ("train.json", b"[]", "--data_path.*train.json is empty"),
    "wrong keys": ("train.json", b'[{"question": "a"}]', "no usable prompts.*keys.*prompt.*train.json:1"),
    "empty turns": ("train.json", b'[\n["a", "b", ""]]', "no usable prompts.*empty turn.*train.json:2"),
    "wrong types": ("train.json", b'[["a", 7]]', "no usable prompts.*a turn is text.*train.json:1"),
    "no training file": ("x.json", b'[["a"]]', "--data_path: no .train.json.*rename"),
}


@pytest.mark.parametrize("case", DATA)
def test_data(refused, tmp_path, case):
    name, content, pattern = DATA[case]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / name).write_bytes(content)
    assert re.search(pattern, refused(data_path=folder))


def test_too_few_prompts_to_hold_some_out(refused, tmp_path):
    data = write_json(tmp_path / "prompts.json", PROMPTS[:3])
    assert re.search("too few to hold out 3.*add data", refused(data_path=data))


@pytest.mark.parametrize("flag", ["policy_model_path", "critic_model_path"])
def test_damaged_weights(refused, inputs, tmp_path, flag):
    source = {"policy_model_path": inputs.policy, "critic_model_path": inputs.reward}[flag]
    shutil.copytree(source, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:20000])
    assert re.search(f"--{flag}: .*model.safetensors.*copy it again", refused(**{flag: tmp_path / "model"}))
    weights.unlink()
    assert re.search(f"--{flag}: no model.safetensors", refused(**{flag: tmp_path / "model"}))


def test_damaged_config(refused, inputs, tmp_path):
    shutil.copytree(inputs.policy, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{")
    assert re.search("--policy_model_path: cannot load the model in", refused(policy_model_path=tmp_path / "model"))


@pytest.mark.parametrize("flag", ["policy_model_path", "critic_model_path", "reward_model_path"])
def test_models_of_another_vocabulary(refused, inputs, tmp_path, flag):
    other = tiny_llama_folder(tmp_path / "model", vocab=300, **SIZES)
    if flag != "policy_model_path":
        model = load_scalar_model(str(other), torch.float32, torch.device("cpu"), say=str)
        save_scalar_model(model, str(other), tokenizer=load_tokenizer(str(inputs.policy)))
    error = refused(**{flag: other, "tokenizer_name_or_path": inputs.policy})
    assert re.search(f"--{flag} .*300 token embeddings.*--tokenizer_name_or_path.*give", error)


def test_a_critic_of_another_tokenizer(refused, tmp_path):
    critic = tiny_llama_folder(tmp_path / "critic", vocab=370, tokenizer=False, **SIZES)
    tiny_tokenizer_folder(critic, 370)
    error = refused(critic_model_path=critic)
    assert re.search("--critic_model_path .*another tokenizer.*--reward_model_path, which may differ", error)


@pytest.mark.parametrize("flag", ["critic_model_path", "reward_model_path"])
def test_what_scores_has_a_head(refused, inputs, flag):
    assert re.search(f"--{flag}: .*policy has no reward head", refused(**{flag: inputs.policy}))


def test_reward_models_whose_scores_mean_different_things(refused, inputs, tmp_path):
    shutil.copytree(inputs.reward, tmp_path / "toxicity")
    config = json.loads((tmp_path / "toxicity" / "config.json").read_text())
    write_json(
        tmp_path / "toxicity" / "config.json", config | {"id2label": {"0": "toxicity"}, "label2id": {"toxicity": 0}}
    )
    error = refused(reward_model_path=[inputs.reward, tmp_path / "toxicity"])
    assert re.search(r"--reward_model_path: the scores of .*/toxicity mean toxicity .*LABEL_0.*: give", error)


def test_tokenizer_without_an_end(refused, tmp_path):
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path / "tokenizer")
    assert re.search("no end-of-sequence token; give", refused(tokenizer_name_or_path=tmp_path / "tokenizer"))


@pytest.mark.parametrize(
    ("code", "pattern"),
    [
        ("x = 3", "--reward_fn .*has no function score"),
        ("score = 3", "--reward_fn .*has no function score"),
        ("import no_such_module", r"--reward_fn .*reward.py:1: ModuleNotFoundError: .*mend"),
        ("\ndef score(:", r"--reward_fn .*reward.py:2: SyntaxError: .*mend"),
    ],
)
def test_reward_functions_that_cannot_be_loaded(refused, tmp_path, code, pattern):
    (tmp_path / "reward.py").write_text(code)
    assert re.search(pattern, refused(reward_fn=f"{tmp_path / 'reward.py'}:score"))


@pytest.mark.parametrize("flag", ["model_save_path", "logdir"])
def test_output_below_a_file(refused, tmp_path, flag):
    (tmp_path / "file").write_text("kept")
    error = refused(**{flag: tmp_path / "file" / "run"})
    assert re.search(f"--{flag} .*file/run cannot be written: .*file is not a writable folder; choose", error)
    assert (tmp_path / "file").read_text() == "kept"


def test_an_existing_run_is_kept(inputs, tmp_path, capfd, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    write_json(out / "config.json", {"of": "an earlier run"})
    error = error_of(run_flags(inputs, out), capfd, monkeypatch)
    assert re.fullmatch(r"error: --model_save_path .* already holds a run: choose another .*--overwrite\n", error)
    assert [file.name for file in out.iterdir()] == ["config.json"]


def stops_before_a_step(inputs, out, capfd, monkeypatch, **changes) -> str:
    """For what shows only while training: one line, no step in metrics.jsonl, no model. Gives the line."""
    error = error_of(run_flags(inputs, out, **changes), capfd, monkeypatch)
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert {file.name for file in out.iterdir()} <= {"config.json", "tensorboard", "bad_batches"}
    return error


@pytest.mark.parametrize(
    ("function", "pattern"),
    [
        ("too_few", "--reward_fn returned 1 numbers for 8 answers"),
        ("words", "--reward_fn must return a list of numbers"),
        ("fails", r"--reward_fn failed: .*reward_file.py:\d+: KeyError: 'no such word'; mend"),
        ("nan_for_rain", "score of response.*not finite"),
    ],
)
def test_reward_functions_that_fail(inputs, tmp_path, capfd, monkeypatch, function, pattern):
    spec = f"{inputs.reward_file}:{function}"
    flags = {"reward_fn": spec}
    assert re.search(pattern, stops_before_a_step(inputs, tmp_path / "out", capfd, monkeypatch, **flags))


def with_nan(folder, source, name: str):
    """A copy of a model folder with NaN in one of its weights."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    weights[name][0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_weights_that_are_not_finite(refused, inputs, tmp_path):
    policy = with_nan(tmp_path / "policy", inputs.policy, "model.norm.weight")
    assert re.search("--policy_model_path: .*not finite.*give", refused(policy_model_path=policy))
    critic = with_nan(tmp_path / "critic", inputs.reward, "score.weight")
    assert re.search("--critic_model_path.*not finite", refused(critic_model_path=critic))


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_a_run_that_diverges_stops_with_a_line(inputs, tmp_path, capfd, monkeypatch, zero_stage):
    """Adam's first step is as long as the learning rate: after one of 1e30 the next minibatch's loss is infinite."""
    flags = {"critic_lr": 1e30, "zero_stage": zero_stage}
    error = stops_before_a_step(inputs, tmp_path / "out", capfd, monkeypatch, **flags)
    assert re.search("the loss of the critic is not finite.*Lower the learning rate", error)
