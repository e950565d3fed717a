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
    python.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" > {log}\n')
    python.chmod(0o755)

    def run(script: str, *flags: str, **settings: str) -> list[str]:
        paths = {"PATH": f"{python.parent}:{os.environ['PATH']}", "OUTPUT": str(tmp_path / "out"), "NUM_GPUS": "0"}
        command = ["bash", "--", script if script.startswith("-") else str(REPOSITORY / script), *flags]
        environment = os.environ | paths | {"VIRTUAL_ENV": "active"} | settings
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
        return log.read_text().rstrip("\0").split("\0")

    return run


def test_sft(recipe, tmp_path):
    argv = recipe("sft/run.sh", "--lr", "2e-5", MODEL="m", DATA="a 2 b 1")
    assert argv[:2] == ["-m", "sft.train"]
    config = parse_args(SFTConfig, argv[2:])
    assert (config.hf_model_name_or_path, config.tokenizer_name_or_path) == ("m", "m")
    assert config.data_path == ["a", "2", "b", "1"]
    assert config.model_save_path == str(tmp_path / "out")
    assert (config.lr, config.batch_size, config.lr_schedule) == (2e-5, 1024, "cosine")


def test_paths_reach_the_command_as_they_are(recipe, tmp_path):
    """Spaces, quotes, patterns, line feeds and what a shell would run, in every path of a recipe."""
    place = tmp_path / 'it\'s "a" $(touch ran) `touch ran`; touch ran & more * [a-z]? \\n\n{a,b} ~'
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
    for name in ("launch.sh", "launchers.sh"):
        shutil.copy(REPOSITORY / "utils" / name, copy.parent / "utils")
    text = (REPOSITORY / script).read_text()
    assert text.count("PRESET:-ppo_max") == 1
    copy.write_text(text.replace("PRESET:-ppo_max", "PRESET:-vanilla"))
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


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("script", ["run_en.sh", "run_zh.sh"])
def test_every_preset_of_a_recipe_has_its_flags(recipe, tmp_path, script, preset):
    """No line of the recipe overwrites what the preset sets."""
    models = dict.fromkeys(("POLICY_MODEL", "REWARD_MODEL", "CRITIC_MODEL", "TOKENIZER", "DATA"), str(tmp_path))
    config = parse_args(PPOConfig, recipe(script, **models, PRESET=preset)[1:], PRESETS, AMOUNTS)
    assert config.preset == preset
    assert {name: getattr(config, name) for name in PRESETS[preset]} == PRESETS[preset]


RECIPES = ["run_en.sh", "run_zh.sh", "sft/run.sh", "reward/run.sh"]
CODE = [
    "x[$(touch ran)]",
    "a[`touch ran`]",
    "1+x[$(touch ran)]",
    "$(touch ran)",
    "-1",
    "0x8",
    "two",
    "9" * 30,
    "8\x1b[2J",
]


@pytest.mark.parametrize("script", RECIPES)
@pytest.mark.parametrize("name", ["NUM_GPUS", "OMP_NUM_THREADS", "MASTER_PORT"])
def test_only_numbers_reach_arithmetic(tmp_path, script, name):
    for value in CODE:
        settings = os.environ | {"OUTPUT": str(tmp_path / "out"), name: value}
        command = ["bash", str(REPOSITORY / script)]
        result = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True)
        assert (result.returncode, result.stdout) == (2, ""), value
        assert result.stderr.startswith(f"error: {name}=") and result.stderr.count("\n") == 1
        assert result.stderr.strip().isprintable()
    assert not list(tmp_path.iterdir()) and not (REPOSITORY / "ran").exists()


def test_other_settings_of_the_shell_do_no_harm(tmp_path):
    """Numbers as some write them, GPUs that are none, a hostfile that looks like a flag, a search path of `cd`."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nprintf 'GPU %s: a\\n' 0 1 2 3 4 5 6 7 8\n")
    program.chmod(0o755)
    (tmp_path / "GPU-x").touch()  # what a pattern would find
    (tmp_path / "GPU-y").touch()
    (tmp_path / "-f").write_text("a slots=1\n")

    def shell(script: str, **settings: str) -> subprocess.CompletedProcess:
        settings = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"} | settings
        words = ["bash", "-euo", "pipefail", "-c", f"source {REPOSITORY}/utils/launch.sh; {script}"]
        return subprocess.run(words, cwd=tmp_path, env=settings, capture_output=True, text=True)

    gpus = {"0,01,2": 3, "08": 1, "09": 0, "*": 0, "GPU-*": 1, "x[$(touch ran)]": 0, "0, 1": 2, str(2**64): 0, "": 0}
    for value, count in gpus.items():
        assert shell("count_gpus", CUDA_VISIBLE_DEVICES=value).stdout == f"{count}\n", value
    assert shell('echo "$NUM_GPUS"', NUM_GPUS="08").stdout == "8\n"
    assert shell('choose_launcher 2; check_hosts 2; echo "$HOSTFILE"', HOSTFILE="-f").stdout == "./-f\n"
    error = shell("check_hosts 2", HOSTFILE="no\n\x1b[2J").stderr
    assert error.startswith("error: HOSTFILE=") and error.strip().isprintable()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("script", RECIPES)
def test_paths_that_look_like_flags(recipe, tmp_path, script):
    """They get ./ in front, in the environment and as values of flags; `cd` finds the recipe's own folder."""
    copy, stage = tmp_path / "-copy", {"sft/run.sh": "-m sft.train", "reward/run.sh": "-m reward.evaluate"}
    for name in (script, "utils/launch.sh", "utils/launchers.sh"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, copy / name)
    (tmp_path / "elsewhere" / "-copy" / script).mkdir(parents=True)
    names = ["POLICY_MODEL", "REWARD_MODEL", "CRITIC_MODEL", "TOKENIZER", "MODEL", "DATA"]
    for name in names:
        (copy / f"-{name}").mkdir()
    settings = {name: f"-{name}" for name in names} | {"OUTPUT": "-out", "CDPATH": str(tmp_path / "elsewhere")}
    argv = recipe(f"-copy/{script}", **settings)
    assert " ".join(argv).startswith(stage.get(script, "train_ppo.py"))
    assert [word for word in argv[1:] if word.startswith("-") and not word.startswith("--")] == []
    assert {"./-DATA", "./-out/best" if "reward" in script else "./-out"} < set(argv)
    assert (copy / "-out" / "train.log").is_file() and len(list(copy.iterdir())) == len(names) + 3
    if script == "sft/run.sh":
        argv = recipe(f"-copy/{script}", "--model_save_path=-new", **settings | {"DATA": "a\n-b\tc"})
        place = argv.index("--data_path")
        assert argv[place + 1 : place + 4] == ["a", "./-b", "c"] and "./-new" in argv
        assert (copy / "-new" / "train.log").is_file()
    if script == "reward/run.sh":
        argv = recipe(f"-copy/{script}", "--model_save_path=-new", "--data_path=-data", **settings)
        assert {"./-data", "./-new/best", "./-new/evaluation"} < set(argv)


@pytest.mark.parametrize("script", ["run_en.sh", "run_zh.sh"])
def test_adapters(recipe, tmp_path, script):
    models = dict.fromkeys(("POLICY_MODEL", "REWARD_MODEL", "CRITIC_MODEL", "TOKENIZER", "DATA"), str(tmp_path))

    def config(**settings: str) -> PPOConfig:
        return parse_args(PPOConfig, recipe(script, **models, **settings)[1:], PRESETS, AMOUNTS)

    whole, adapters = config(), config(LORA="1")
    assert (whole.lora_rank, adapters.lora_rank, adapters.critic_lora_rank) == (0, 16, 16)
    assert adapters.lr == pytest.approx(10 * whole.lr)
    changed = {name for name in vars(whole) if getattr(whole, name) != getattr(adapters, name)}
    assert changed == {"lora_rank", "critic_lora_rank", "lora_alpha", "lr", "given"}
