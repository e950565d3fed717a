"""Flags of train_ppo.py: presets, switches and amounts, the released script's flags, mistakes."""

import shlex

import pytest

from ppo.config import AMOUNTS, PRESETS, PPOConfig
from reward.config import RewardConfig
from sft.config import SFTConfig
from utils.errors import UserError
from utils.flags.parser import build_parser, changed_flags, entry_point, field_help, parse_args

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
    reward_model_path reward_fn template preset critic_pretrain_steps ppo_epochs micro_batch_tokens kl_estimator kl_in
    dtype zero_stage offload_optimizer offload_frozen gradient_clip num_eval_prompts report_to overwrite lr_schedule
"""
PATHS = ["--policy_model_path", "P", "--critic_model_path", "C", "--data_path", "D"]


def parsed(*flags: str) -> PPOConfig:
    return parse_args(PPOConfig, [*PATHS, *flags], PRESETS, AMOUNTS)


def test_released_script_parses():
    config = parse_args(PPOConfig, RELEASED_FLAGS.split(), PRESETS, AMOUNTS)
    assert (config.lr, config.critic_lr, config.lam, config.kl_penalty_weight) == (5e-7, 1.5e-6, 0.95, 0.01)
    assert config.use_reward_scaling and config.use_critic_loss_clip and config.gradient_checkpoint
    assert not config.use_reward_clip  # its --reward_clip 0. means no clipping
    config.check_world(1, 32_000)  # and --entropy_clip 35 without an entropy bonus harms nobody


def test_released_reward_script_parses():
    config = parse_args(RewardConfig, RELEASED_REWARD_FLAGS.split())
    assert (config.batch_size, config.validation_metric, config.larger_is_better) == (4, "loss", False)
    assert (config.delimiter, config.gradient_checkpoint) == ("</s>", True)
    config = parse_args(RewardConfig, [*RELEASED_REWARD_FLAGS.split(), "--validation_metric", "rm_acc"])
    assert (config.validation_metric, config.larger_is_better) == ("accuracy", True)


def test_every_kept_flag_exists_with_help():
    known = {option for action in build_parser(PPOConfig)._actions for option in action.option_strings}
    assert {f"--{name}" for name in KEPT_NAMES.split()} <= known
    texts = field_help(PPOConfig)
    assert all(texts[name] for name in KEPT_NAMES.split())


def test_every_default_is_ppo_max():
    config = parsed()
    assert config == parsed("--preset", "ppo_max")
    assert config.use_reward_scaling and config.use_reward_norm and config.use_reward_clip
    assert config.use_critic_loss_clip and config.use_policy_loss_clip and config.kl_penalty_weight > 0
    assert config.critic_pretrain_steps > 0
    assert (config.temperature, config.topp, config.repetition_penalty) == (1.0, 1.0, 1.0)


def test_vanilla_switches_every_trick_off_but_the_clipped_surrogate():
    config = parsed("--preset", "vanilla")
    assert config.use_policy_loss_clip and config.pg_clip == 0.2
    assert config.kl_penalty_weight == 0.0 and config.critic_pretrain_steps == 0
    on = {switch for switch in vars(config) if switch.startswith("use_") and getattr(config, switch)}
    assert on == {"use_policy_loss_clip"}


def test_explicit_flags_win_over_a_preset_on_either_side():
    for flags in (
        ["--preset", "vanilla", "--kl_penalty_weight", "0.2"],
        ["--kl_penalty_weight=0.2", "--preset=vanilla"],
    ):
        assert parsed(*flags).kl_penalty_weight == 0.2
    config = parsed("--preset", "vanilla", "--use_reward_clip", "--reward_clip", "0.8")
    assert config.use_reward_clip and config.reward_clip == 0.8


def test_every_trick_can_be_switched_off():
    for switch in ("use_reward_scaling", "use_reward_norm", "use_reward_clip", "use_policy_loss_clip"):
        assert getattr(parsed(), switch) is True
        assert getattr(parsed(f"--no_{switch}"), switch) is False
        assert getattr(parsed(f"--{switch}", "false"), switch) is False


@pytest.mark.parametrize(("switch", "amount"), AMOUNTS.items())
def test_a_switch_with_amount_zero_is_refused(switch, amount):
    with pytest.raises(UserError, match=f"--{switch} with --{amount} 0"):
        parsed("--ppo_pretrain_data_path", "T", f"--{switch}", f"--{amount}", "0")


@pytest.mark.parametrize("switch", ["use_reward_clip", "use_critic_loss_clip", "use_policy_loss_clip"])
def test_amount_zero_alone_switches_a_presets_trick_off(switch):
    assert getattr(parsed(f"--{AMOUNTS[switch]}", "0"), switch) is False


def test_lists_words_for_switches_and_hyphens():
    config = parsed("--reward-model-path", "A", "B", "--overwrite", "Yes", "--no-use-reward-norm", "--zero_stage", "3")
    assert config.reward_model_path == ["A", "B"]
    assert (config.overwrite, config.use_reward_norm, config.zero_stage) == (True, False, 3)
    assert parsed("--preset", "vanilla", "--use_reward_norm", "1").use_reward_norm is True
    with pytest.raises(UserError, match=r"--overwrite.*perhaps is neither true nor false"):
        parsed("--overwrite", "perhaps")


def test_unknown_flag_gets_a_suggestion():
    with pytest.raises(UserError, match=r"--kl_penalty_wieght.*did you mean --kl_penalty_weight\?"):
        parsed("--kl_penalty_wieght", "0.1")


@pytest.mark.parametrize(
    "flags",
    [
        RELEASED_FLAGS,
        "--preset vanilla --lam 0.9 --reward_model_path A B",
        "--preset vanilla --kl_penalty_weight 0.05 --use_reward_scaling True --gradient_clip 1",
        "--report_to=-x --no_use_reward_norm",
        "",
    ],
)
def test_changed_flags_give_the_same_config(flags):
    config = parsed(*flags.split(), "--logdir", "my logs; $(ls)")
    words = changed_flags(config)
    assert "'my logs; $(ls)'" in words and "--topp" not in words
    assert parse_args(PPOConfig, shlex.split(words), PRESETS, AMOUNTS) == config


def test_changed_flags_of_lists_of_numbers():
    flags = "--hf_model_name_or_path M --model_save_path O --data_path A B --data_weights 2 0.5"
    config = parse_args(SFTConfig, flags.split())
    words = changed_flags(config)
    assert "--data_weights 2.0 0.5" in words and parse_args(SFTConfig, words.split()) == config


def test_no_abbreviations():
    with pytest.raises(UserError, match="--critic_l"):
        parsed("--critic_l", "1e-6")


def test_launchers_rank_is_accepted_and_forgotten():
    assert parsed("--local_rank", "1") == parsed("--local_rank=0") == parsed()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--maxlen_res 2048", "--maxlen_res 2048 leaves no room"),
        ("--num_rollouts 10 --batch_size 4", "--num_rollouts 10 is not a multiple of --batch_size 4"),
        ("--warmup_steps 0", "--warmup_steps 0"),
        ("--lam 1.5", "--lam 1.5"),
        ("--lr nan", "--lr nan"),
        ("--temperature 0", "--temperature 0"),
        ("--kl_in loss", "--kl_in loss needs --kl_estimator k2 or k3"),
        ("--zero_stage 0", "--zero_stage 0"),
        ("--grad_accum_dtype fp32 --zero_stage 1", "--grad_accum_dtype fp32 with --zero_stage 1"),
        ("--router_aux_loss_coef -1", "--router_aux_loss_coef -1"),
        ("--lang fr", "--lang"),
        ("--preset fast", "--preset"),
        ("--train_steps many", "--train_steps"),
    ],
)
def test_mistakes_name_their_flag(flags, message):
    with pytest.raises(UserError, match=message):
        parsed(*flags.split())


def test_batches_must_divide_by_the_processes():
    with pytest.raises(UserError, match="--num_rollouts 128 does not divide by the 3 processes"):
        parsed().check_world(3, 32_000)


def test_entry_point_prints_one_line_and_exits_with_2(capsys):
    @entry_point
    def main(argv):
        raise UserError("--lr: too high")

    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: --lr: too high\n"


def test_entry_point_answers_ctrl_c_without_a_traceback(capsys):
    @entry_point
    def main(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 130
    assert "stopped by Ctrl-C" in capsys.readouterr().err
