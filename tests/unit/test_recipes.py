"""The recipes: from anywhere, their flags are ones that the stage knows, and what the user adds wins."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ppo.config import AMOUNTS, PRESETS, PPOConfig
from sft.config import SFTConfig
from utils.flags.parser import parse_args

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def recipe(tmp_path):
    """Runs a recipe with a stand-in for python and gives the command line that it was called with."""
    python, log = tmp_path / "bin" / "python", tmp_path / "argv"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {log}\n')
    python.chmod(0o755)

    def run(script: str, *flags: str, **settings: str) -> list[str]:
        paths = {"PATH": f"{python.parent}:{os.environ['PATH']}", "OUTPUT": str(tmp_path / "out"), "NUM_GPUS": "0"}
        command = ["bash", str(REPOSITORY / script), *flags]
        environment = os.environ | paths | {"VIRTUAL_ENV": "active"} | settings
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
        return log.read_text().splitlines()

    return run


def test_sft(recipe, tmp_path):
    argv = recipe("sft/run.sh", "--lr", "2e-5", MODEL="m", DATA="a b", DATA_WEIGHTS="2 1")
    assert argv[:2] == ["-m", "sft.train"]
    config = parse_args(SFTConfig, argv[2:])
    assert (config.hf_model_name_or_path, config.tokenizer_name_or_path) == ("m", "m")
    assert (config.data_path, config.data_weights) == (["a", "b"], [2, 1])
    assert config.model_save_path == str(tmp_path / "out")
    assert (config.lr, config.batch_size, config.lr_schedule) == (2e-5, 1024, "cosine")


def test_paths_reach_the_command_as_they_are(recipe, tmp_path):
    """Spaces, quotes and what a shell would run, in every path of a recipe."""
    place = tmp_path / 'it\'s "a" $(touch ran) `touch ran`; touch ran & more'
    names = {"POLICY_MODEL": "policy_model_path", "REWARD_MODEL": "reward_model_path", "DATA": "data_path"}
    names |= {"CRITIC_MODEL": "critic_model_path", "TOKENIZER": "tokenizer_name_or_path"}
    for name in names:
        (place / name).mkdir(parents=True)
    settings = {name: str(place / name) for name in names} | {"OUTPUT": str(place / "out")}
    for script in ("run_en.sh", "run_zh.sh"):
        argv = recipe(script, "--report_to", "$(touch ran)", **settings)
        for name, flag in names.items():
            assert argv[argv.index(f"--{flag}") + 1] == str(place / name)
        assert argv[argv.index("--model_save_path") + 1] == str(place / "out")
        assert argv[-1] == "$(touch ran)"
    assert (place / "out" / "train.log").is_file()
    assert not list(tmp_path.rglob("ran")) and not (REPOSITORY / "ran").exists()


@pytest.mark.parametrize("script", ["run_en.sh", "run_zh.sh"])
def test_the_preset_counts_wherever_it_is_changed(recipe, tmp_path, script):
    """PPO-max as it comes; plain PPO where the flag is added, and where the line in the recipe is edited."""
    copy = tmp_path / "edited" / script
    (copy.parent / "utils").mkdir(parents=True)
    shutil.copy(REPOSITORY / "utils" / "launch.sh", copy.parent / "utils")
    text = (REPOSITORY / script).read_text()
    assert text.count("--preset ppo_max # ") == 1
    copy.write_text(text.replace("--preset ppo_max # ", "--preset vanilla # "))
    models = dict.fromkeys(("POLICY_MODEL", "REWARD_MODEL", "CRITIC_MODEL", "TOKENIZER", "DATA"), str(tmp_path))

    def config(*command: str) -> PPOConfig:
        return parse_args(PPOConfig, recipe(*command, **models)[1:], PRESETS, AMOUNTS)

    tricks = ("use_reward_scaling", "use_reward_norm", "use_reward_clip", "use_critic_loss_clip", "use_advantage_norm")
    released = config(script)
    assert released == config(str(copy), "--preset", "ppo_max")
    assert released.kl_penalty_weight == 0.05 and all(getattr(released, trick) for trick in tricks)
    for plain in (config(script, "--preset", "vanilla"), config(script, "--preset=vanilla"), config(str(copy))):
        assert plain.preset == "vanilla" and plain.kl_penalty_weight == plain.critic_pretrain_steps == 0
        assert not any(getattr(plain, trick) for trick in tricks)
