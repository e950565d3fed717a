"""Flags: presets, switches and amounts, the released scripts' flags, other libraries' names, files, help, mistakes."""

import dataclasses
import json
import shlex
import subprocess
import sys

import pytest

from ppo.benchmark_flags import BenchmarkConfig
from ppo.chat_flags import ChatConfig
from ppo.compare_flags import CompareConfig
from ppo.config import AMOUNTS, PRESETS, PPOConfig
from ppo.overoptimisation_flags import CheckpointsConfig
from reward.config import RewardConfig
from reward.evaluation.flags import EvaluateConfig, StrengthConfig
from reward.scoring.score_flags import ScoreConfig
from sft.config import SFTConfig
from tests.helpers.tiny_run import REPOSITORY, clean_environment
from utils.errors import UserError
from utils.flags.checks import keep_sizes
from utils.flags.fields import default_of
from utils.flags.help import explain, field_help, overview
from utils.flags.other_names import OURS, explain_unknown
from utils.flags.parser import changed_flags, entry_point, parse_args
from utils.run.folder import run_description

RELEASED_FLAGS = """
    --tokenizer_name_or_path X --policy_model_path X --critic_model_path X --model_save_path X --data_path X --seed 42
    --maxlen_prompt 2048 --maxlen_res 512 --lr 5e-7 --critic_lr 1.5e-6 --gamma 1. --lam 0.95 --entropy_clip 35.0
    --value_clip 0.2 --pg_clip 0.2 --reward_clip 0. --entropy_loss_weight 0. --ppo_pretrain_loss_weight 0.
    --kl_penalty_weight 0.01 --use_reward_scaling --use_critic_loss_clip --use_policy_loss_clip --train_steps 1000
    --save_per_step 100 --warmup_steps 100 --batch_size 2 --rollout_batch_size 2 --num_rollouts 2 --gradient_checkpoint
    --lang en --logdir X
"""
RELEASED_REWARD_FLAGS = """
    --hf_model_name_or_path X --model_save_path X --batch_size 4 --context_truncate 2048 --data_path X
    --train_steps 1000 --warmup_steps 100 --save_per_step 500 --print_interval 5 --validation_metric rm_loss --lr 5e-6
    --reward_lm_loss_factor 0 --gradient_checkpoint --delimiter </s> --logdir X
"""
KEPT_NAMES = """
    policy_model_path critic_model_path tokenizer_name_or_path model_save_path data_path logdir lr critic_lr seed
    batch_size train_steps warmup_steps save_per_step maxlen_prompt maxlen_res gradient_checkpoint num_rollouts
    rollout_batch_size kl_penalty_weight advantage_clip reward_clip pg_clip value_clip entropy_clip gamma lam
    vf_loss_weight entropy_loss_weight ppo_pretrain_data_path ppo_pretrain_loss_weight use_reward_clip
    use_reward_scaling use_reward_norm use_critic_loss_clip use_policy_loss_clip use_advantage_norm use_advantage_clip
    use_ppo_pretrain_loss use_entropy_loss temperature topp repetition_penalty lang
"""
CONFIGS = (PPOConfig, CompareConfig, ChatConfig, RewardConfig, EvaluateConfig, ScoreConfig, StrengthConfig, SFTConfig)
CONFIGS += (CheckpointsConfig, BenchmarkConfig)
PATHS = ["--policy_model_path", "P", "--critic_model_path", "C", "--data_path", "D"]


def parsed(*flags: str) -> PPOConfig:
    return parse_args(PPOConfig, [*PATHS, *flags], PRESETS, AMOUNTS)


def names(config_type: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config_type)}


def test_released_script_parses():
    config = parse_args(PPOConfig, RELEASED_FLAGS.split(), PRESETS, AMOUNTS)
    assert (config.lr, config.critic_lr, config.lam, config.kl_penalty_weight) == (5e-7, 1.5e-6, 0.95, 0.01)
    assert config.use_reward_scaling and config.use_critic_loss_clip and config.gradient_checkpoint
    assert not config.use_reward_clip  # its --reward_clip 0. means no clipping
    config.check_world(1, 32_000)  # --entropy_clip 35 is above ln(vocabulary), but there is no entropy bonus
    assert set(KEPT_NAMES.split()) <= names(PPOConfig)


def test_released_reward_script_parses():
    config = parse_args(RewardConfig, RELEASED_REWARD_FLAGS.split())
    assert (config.batch_size, config.validation_metric, config.larger_is_better) == (4, "loss", False)
    assert (config.delimiter, config.gradient_checkpoint) == ("</s>", True)
    config = parse_args(RewardConfig, [*RELEASED_REWARD_FLAGS.split(), "--validation_metric", "rm_acc"])
    assert (config.validation_metric, config.larger_is_better) == ("accuracy", True)


def test_presets():
    assert parsed() == parsed("--preset", "ppo_max")
    config = parsed("--preset", "vanilla")
    assert config.kl_penalty_weight == 0.0 and config.critic_pretrain_steps == 0
    assert {name for name, x in vars(config).items() if name.startswith("use_") and x} == {"use_policy_loss_clip"}


def test_flags_win_over_a_preset_on_either_side():
    for flags in ("--preset vanilla --kl_penalty_weight 0.2", "--kl_penalty_weight=0.2 --preset=vanilla"):
        assert parsed(*flags.split()).kl_penalty_weight == 0.2
    config = parsed("--preset", "vanilla", "--use_reward_clip", "--reward_clip", "0.8", "--use_reward_norm", "1")
    assert config.use_reward_clip and config.reward_clip == 0.8 and config.use_reward_norm is True


def test_an_amount_of_0_switches_off():
    for switch, amount in AMOUNTS.items():
        assert getattr(parsed(f"--{amount}", "0"), switch) is False


@pytest.mark.parametrize(
    ("flags", "answers"),
    [
        ("--kl_coef=0.1 --cliprange 0.2", ["--kl_coef is unknown; use --kl_penalty_weight", "use --pg_clip"]),
        (
            "--num_train_epochs 2 --lora_r 8",
            ["use --train_steps", "not epochs", "--lora_r is unknown; use --lora_rank"],
        ),
        ("--reward-clip 1 --no_use_reward_norm", ["use --reward_clip", "use --use_reward_norm false"]),
        ("--kl_penalty_wieght 1 --critic_l 1", ["did you mean --kl_penalty_weight?", "--critic_l is unknown"]),
    ],
)
def test_unknown_flags_are_answered_with_ours(flags, answers):
    with pytest.raises(UserError) as error:
        parsed(*flags.split())
    for answer in answers:
        assert answer in str(error.value)


def test_answers_to_other_names_are_flags():
    assert {name for group in OURS for name in group.split()} <= set().union(*map(names, CONFIGS))
    assert explain_unknown(["--kl_coef=1"], names(SFTConfig)) == "--kl_coef is unknown (see --help)"


@pytest.mark.parametrize("config_type", CONFIGS)
def test_every_flag_has_a_text_and_stands_once_in_help(config_type):
    texts, shown = field_help(config_type), overview(config_type, every=True).splitlines()
    for field in dataclasses.fields(config_type):
        assert texts[field.name][0].isupper(), field.name
        assert sum(line.startswith(f"  --{field.name} ") for line in shown) == 1
    common = sum(line.startswith("  --") for line in overview(config_type, every=False).splitlines())
    assert common < min(41, len(names(config_type)) + 3)  # 3 of the parser


def test_one_flag_is_explained(capsys):
    text = " ".join(explain(PPOConfig, "reward_clip").split())
    assert text.startswith("--reward_clip FLOAT (default: 0.3) group: PPO-max tricks Clip normalised scores")
    assert "Part I, Figure 6" in text
    with pytest.raises(SystemExit) as stopped:
        parsed("--lr", "1", "--help", "--kl_in")
    assert not stopped.value.code and capsys.readouterr().out.startswith("--kl_in reward|loss  (default: reward)")
    with pytest.raises(UserError, match="did you mean --kl_in"):
        parsed("--help", "kl_on")
    with pytest.raises(SystemExit):
        parsed("--help", "kl_")
    shown = capsys.readouterr().out
    assert "--kl_in " in shown and "--kl_estimator " in shown and "--lr " not in shown
    assert "--reward_model_path TEXT ...  (default: --critic_model_path)" in overview(PPOConfig, every=False)


def test_values_of_a_file(tmp_path):
    file = tmp_path / "flags.yaml"
    file.write_text("preset: vanilla\nlr: 5e-7\nuse_reward_clip: yes\nreward_model_path: [A, B]\nlogdir: null\n")
    config = parsed("--lr", "1e-6", "--config", str(file))
    assert (config.lr, config.use_reward_clip, config.reward_model_path) == (1e-6, True, ["A", "B"])
    assert config.kl_penalty_weight == 0 and config.logdir is None  # of the preset; the default
    assert parsed("--config", str(file)).lr == 5e-7  # which YAML 1.1 takes for text


def test_mistakes_in_a_file_name_the_place(tmp_path):
    file = tmp_path / "flags.yaml"
    for text, place in (("lr: 1\n\ntrain_step: 2\n", ":3: --train_step is unknown"), ("- lr\n", " holds no flags")):
        file.write_text(text)
        with pytest.raises(UserError, match=f"^--config {file}{place}"):
            parsed("--config", str(file))


def test_the_record_of_a_run_gives_its_flags(tmp_path):
    config = parsed("--preset", "vanilla", "--train_steps", "20", "--lam", "0.9", "--reward_model_path", "A", "B")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(run_description(config) | {"resumed_from_step": 0, "overwrite": True}))
    again = parse_args(PPOConfig, ["--config", str(file)], PRESETS, AMOUNTS)
    assert again == config and again.warmup_steps == 2 and not again.overwrite
    assert "batch_size" not in again.given  # a default of that run may give way here too
    with pytest.raises(UserError, match=r"--preset ppo_max has no effect on .*--kl_penalty_weight"):
        parsed("--config", str(file), "--preset", "ppo_max")
    with pytest.raises(UserError, match=r"config.json of another command .* is unknown"):
        parse_args(SFTConfig, ["--config", str(file)])


@pytest.mark.parametrize(
    ("flags", "name", "value", "explicit"),
    [
        ("--train_steps 50", "warmup_steps", 5, "100"),
        ("--maxlen_prompt 200", "maxlen_res", 100, "512"),
        ("--num_rollouts 48", "batch_size", 16, "32"),
        ("--batch_size 48", "num_rollouts", 96, "128"),
    ],
)
def test_defaults_give_way_and_explicit_values_are_refused(flags, name, value, explicit, capsys):
    config = parsed(*flags.split())
    assert getattr(config, name) == value
    assert config.replaced_defaults == {name: default_of(PPOConfig.__dataclass_fields__[name])}
    assert f"--{name} " in capsys.readouterr().out
    with pytest.raises(UserError, match=f"--{name}"):
        parsed(*flags.split(), f"--{name}", explicit)


@pytest.mark.parametrize(
    ("ranks", "flags", "sizes"),
    [
        (16, "", (128, 32)),
        (24, "", (120, 24)),
        (48, "", (144, 48)),
        (64, "", (128, 64)),
        (24, "--num_rollouts 144", (144, 24)),
        (24, "--batch_size 48", (96, 48)),
    ],
)
def test_default_sizes_become_multiples_of_the_number_of_ranks(ranks, flags, sizes):
    config = parsed(*flags.split())
    config.check_world(ranks, 32_000)
    assert (config.num_rollouts, config.batch_size) == sizes


@pytest.mark.parametrize(
    ("ranks", "flags", "advice"),
    [
        (24, "128 32", r"120 --batch_size 24 or --num_rollouts 144 --batch_size 48"),
        (48, "128 32", r"144 --batch_size 48"),
        (64, "128 32", r"128 --batch_size 64"),
        (24, "100", r"96 --batch_size 24 or --num_rollouts 96 --batch_size 48"),
    ],
)
def test_explicit_sizes_that_do_not_divide_are_refused_with_some_that_do(ranks, flags, advice):
    words = [word for pair in zip(("--num_rollouts", "--batch_size"), flags.split(), strict=False) for word in pair]
    with pytest.raises(UserError, match=rf"do(es)? not divide by the {ranks} processes; pass --num_rollouts {advice}$"):
        parsed(*words).check_world(ranks, 32_000)


def test_a_resumed_run_keeps_the_sizes_of_its_checkpoint():
    """Those of 24 ranks on 8, where the defaults would do, too; 16 do not divide them."""
    config = parsed()
    keep_sizes(config, {"num_rollouts": 120, "batch_size": 24})
    config.check_world(8, 32_000)
    config.fit_prompts(130, 8)
    assert (config.num_rollouts, config.batch_size) == (120, 24)
    assert config.replaced_defaults == {"num_rollouts": 128, "batch_size": 32}
    with pytest.raises(UserError, match="--num_rollouts 120 and --batch_size 24 do not divide by the 16 processes"):
        config.check_world(16, 32_000)


def test_supervised_batches_have_a_record_per_rank():
    flags = ["--hf_model_name_or_path", "M", "--data_path", "D"]
    config = parse_args(SFTConfig, flags)
    config.check_ranks(48)
    assert config.batch_size == 48
    with pytest.raises(UserError, match="--batch_size 32 is less than the 48 ranks"):
        parse_args(SFTConfig, [*flags, "--batch_size", "32"]).check_ranks(48)


def test_changed_flags_give_the_same_config():
    flags = "--preset vanilla --kl_penalty_weight 0.05 --use_reward_scaling True --report_to=-x --reward_model_path A B"
    config = parsed(*flags.split(), "--logdir", "my logs; $(ls)")
    words = changed_flags(config)
    assert "'my logs; $(ls)'" in words and "--topp" not in words
    assert parse_args(PPOConfig, shlex.split(words), PRESETS, AMOUNTS) == config


def test_lists_and_what_launchers_append():
    flags = "--hf_model_name_or_path M --model_save_path O --data_path A 2 B 0.5 --local_rank=1"
    config = parse_args(SFTConfig, flags.split())
    assert config.data_path == ["A", "2", "B", "0.5"] and "--data_path A 2 B 0.5" in changed_flags(config)


@pytest.mark.parametrize(
    ("raised", "argv", "code", "lines"),
    [
        (UserError("--lr:\ntoo high"), [], 2, ["error: --lr: too high"]),
        (UserError("--lr"), ["--debug"], 2, ["Traceback (most recent call last):", "error: --lr"]),
        (KeyboardInterrupt(), [], 130, ["stopped by Ctrl-C"]),
    ],
)
def test_entry_point(raised, argv, code, lines, capsys):
    @entry_point
    def main(argv):
        assert not argv
        raise raised

    with pytest.raises(SystemExit) as stopped:
        main(argv)
    shown = capsys.readouterr().err.splitlines()
    assert stopped.value.code == code and [shown[0], shown[-1]] == [lines[0], lines[-1]]


def test_a_bug_keeps_its_traceback():
    with pytest.raises(KeyError):
        entry_point(lambda argv: {}["no such key"])([])


PROBE = """
import json, runpy, sys
module, *flags = sys.argv[1:]
sys.argv = [module, *flags]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
except SystemExit as end:
    print(json.dumps([end.code, sorted({name.split(".")[0] for name in sys.modules})]))
"""
MODULES = [
    "train_ppo",
    "sft.train",
    "reward.train",
    "reward.evaluate",
    "reward.strength",
    "reward.score",
    "ppo.compare",
    "ppo.chat",
    "ppo.critic",
]


@pytest.mark.parametrize(
    ("module", "flag", "code"),
    [("merge_weight_en", "--help", 0), *((m, *case) for m in MODULES for case in (("--help", 0), ("--dtpye", 2)))],
)
def test_help_and_wrong_flags_import_nothing_heavy(module, flag, code):
    """Imports of torch, transformers and deepspeed take seconds."""
    words, environment = [sys.executable, "-c", PROBE, module, flag], clean_environment()
    result = subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    first, last = (result.stdout.splitlines()[place] for place in (0, -1))
    found_code, modules = json.loads(last)
    assert found_code == code
    assert not {"torch", "transformers", "deepspeed", "numpy", "datasets"} & set(modules)
    if code:
        assert result.stderr == "error: --dtpye is unknown; did you mean --dtype? (see --help)\n"
    else:
        assert first.startswith("usage: ") and module in first


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.yaml", "lr: !!timestamp x", "cannot be read"), ("a.yaml", "lr: !!int ''", "cannot be read"),
        ("a.yaml", "lr: !!bool x", "cannot be read"), ("a.yaml", "[" * 10**5, "cannot be read"),
        ("a.json", "[" * 10**5, "nested too deeply"), ("a.json", '{"seed": ' + "9" * 5000 + "}", "Exceeds the limit"),
        ("a.json", "x" * (1 << 20 | 1), "more than 1 MB"), ("a.json", '{"logdir": "\\ud800"}', "surrogates"),
        ("a.json", '{"logdir": "a\\u0000"}', ":1: .*is not UTF-8"), ("a.json", b"\xff", "can't decode"),
        ("a.yaml", "lr: &a [*a]", ":1: --lr is neither a value nor a list"),
        ("a.yaml", "a: &a [x, x]\nb: &b [*a, *a]\n" + "\n" * 10**5 + "lr: [*b]", ":1: --a is unknown"),
        ("a.yaml", "\n" * 10**5 + "{lr: 1, nope: 3}", ":1: --nope is unknown"),
        ("a.json", '{"argv": 3, "versions": {}, "nope": 3}', r"of another command or version \(3\)"),
        ("a.json", '{"lr": {"a": 1}}', ":1: --lr is neither a value nor a list"),
    ],
)  # fmt: skip
def test_a_file_of_flags_that_is_none(tmp_path, name, content, reason):
    """Quickly, too: neither nested aliases nor blank lines are worked through again and again."""
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=rf"^--config {tmp_path}/{name}.*{reason}"):
        parsed("--config", str(tmp_path / name))


def test_a_word_that_is_not_text_is_refused():
    """The run's own files name all flags in UTF-8; nothing would be written after hours of training."""
    with pytest.raises(UserError, match=r"'a\\udcff' on the command line, or in --config, is not UTF-8"):
        parsed("--model_save_path", "a\udcff")


def test_an_error_of_the_system_is_one_line(tmp_path, capfd):
    """Such as too many open files, where no flag is at fault; --debug shows where. A bug stays a traceback."""

    def fails(argv: list[str]) -> None:
        if "bug" in argv:
            raise OSError("no errno")
        (tmp_path / "none").read_text()

    for argv in ([], ["--debug"]):
        with pytest.raises(SystemExit) as stopped:
            entry_point(fails)(argv)
        *before, last = capfd.readouterr().err.splitlines()
        assert stopped.value.code == 2 and ("Traceback" in "".join(before)) == bool(argv)
        assert last == f"error: No such file or directory ({tmp_path}/none); --debug shows where"
    with pytest.raises(OSError, match="no errno"):
        entry_point(fails)(["bug"])
