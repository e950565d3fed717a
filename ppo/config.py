"""The flags of `train_ppo.py` together: presets and limits. No torch: a wrong flag is reported at once."""

import math
from dataclasses import dataclass, field

from ppo.estimators import needs_of
from ppo.flag_checks import check_adapters, check_estimator, check_losses, check_rollout_engine
from ppo.flags.algorithm import AdvantageFlags, CriticFlags, LossFlags, TrickFlags
from ppo.flags.monitoring import AlarmFlags, PlanFlags
from ppo.flags.sampling import (
    DecodingFlags,
    GatherFlags,
    LengthFlags,
    RolloutEngineFlags,
    RolloutTrainingFlags,
    SamplingFlags,
)
from ppo.flags.training import DataFlags, ReferenceFlags, TrainingFlags
from ppo.presets import PRESETS
from ppo.reward_fn_flags import RewardFunctionFlags
from reward.scoring.flags import RewardFlags
from utils.errors import UserError
from utils.flags.checks import SIZES, check_range, fit_warmup, is_default, replace_default
from utils.flags.data import RecordFlags
from utils.flags.engine import RouterFlags
from utils.flags.fields import Common
from utils.flags.run import RunFlags

AMOUNTS = {
    "use_reward_clip": "reward_clip",
    "use_advantage_clip": "advantage_clip",
    "use_policy_loss_clip": "pg_clip",
    "use_critic_loss_clip": "value_clip",
    "use_entropy_loss": "entropy_loss_weight",
    "use_ppo_pretrain_loss": "ppo_pretrain_loss_weight",
}


def _nearest(number: int, step: int) -> int:
    """Returns the multiple of `step` that is nearest to a number, at least `step`."""
    return max(1, round(number / step)) * step


@dataclass
class PPOConfig(
    DataFlags, RewardFunctionFlags, TrainingFlags, ReferenceFlags, TrickFlags, AdvantageFlags, CriticFlags, LossFlags,
    LengthFlags, SamplingFlags, RolloutEngineFlags, RolloutTrainingFlags, AlarmFlags, DecodingFlags, GatherFlags,
    RewardFlags, RouterFlags, RecordFlags, RunFlags, PlanFlags,
):  # fmt: skip
    """Align a language model with PPO-max.

    bash run_en.sh [flags] starts this command with values of its own, some of which differ from the defaults below;
    bash run_en.sh --demo trains small models
    """

    trains, base_flag = "policy", "policy_model_path"
    hint = "see --help; or bash run_en.sh --demo"
    required = ("policy_model_path", "critic_model_path", "data_path", "model_save_path")

    reward_model_path: Common[list[str]] = field(default_factory=list)
    """Reward model that scores the responses, or several: folders or hub ids. Default: --critic_model_path"""
    model_save_path: Common[str] = "outputs/ppo"
    """Folder of the run: config.json, metrics.jsonl, samples.jsonl, checkpoints/, best/, final/"""

    def __post_init__(self) -> None:
        if not self.has_critic and (self.reward_model_path or self.reward_fn):
            self.required = tuple(name for name in self.required if name != "critic_model_path")
        super().__post_init__()
        if self.alarm_kl is None:  # experiments/RESULTS.md: the quality of short answers falls long before 100 nats
            self.alarm_kl = min(100.0, float(self.maxlen_res))
        self._check_numbers()
        check_losses(self)
        check_estimator(self)
        check_adapters(self)
        check_rollout_engine(self)
        fit_warmup(self)
        self._fit_batches()

    def _fit_batches(self) -> None:
        """Makes default sizes fit each other. Raises UserError for explicit ones that do not."""
        reason = f"--num_rollouts {self.num_rollouts} is not a multiple of --batch_size {self.batch_size}"
        if self.num_rollouts % self.batch_size:
            replace_default(self, "batch_size", math.gcd(self.num_rollouts, self.batch_size), reason)
        if self.num_rollouts % self.batch_size:
            buffer = max(1, self.num_rollouts // self.batch_size) * self.batch_size
            replace_default(self, "num_rollouts", buffer, reason)
        if self.num_rollouts % self.batch_size:
            raise UserError(f"{reason}: a buffer is split into whole batches; pass a multiple")
        self._fit_groups(
            self.num_responses_per_prompt, f"--num_responses_per_prompt is {self.num_responses_per_prompt}"
        )

    def _fit_groups(self, unit: int, reason: str) -> None:
        """Rounds a default --num_rollouts to whole groups, `unit` responses. Raises UserError for an explicit one."""
        if self.num_rollouts % unit:
            size = _nearest(self.num_rollouts, math.lcm(self.batch_size, unit))
            replace_default(self, "num_rollouts", size, reason)
        if self.num_rollouts % unit:
            size = _nearest(self.num_rollouts, math.lcm(self.batch_size, unit))
            raise UserError(f"--num_rollouts {self.num_rollouts} is not a multiple of {unit}, as {reason}; pass {size}")

    def _fit_ranks(self, num_ranks: int) -> None:
        """Makes default sizes multiples of the number of ranks. Raises UserError for explicit ones that are not."""
        bad = [f"--{name} {getattr(self, name)}" for name in SIZES if getattr(self, name) % num_ranks]
        buffer_varies, batch_varies = (is_default(self, name) for name in SIZES)
        buffer, batch = (self.replaced_defaults.get(name, getattr(self, name)) for name in SIZES)
        multiples = range(num_ranks, max(buffer, batch) + num_ranks, num_ranks)
        batches = [size for size in multiples if buffer_varies or buffer % size == 0]
        if bad and batches and batch_varies:
            reason = f"it is divided among {num_ranks} processes"
            replace_default(self, "batch_size", min(batches, key=lambda size: abs(size - batch)), reason)
            replace_default(self, "num_rollouts", _nearest(buffer, self.batch_size), reason)
        elif bad:
            fitting = [size for size in multiples if abs(size - batch) < num_ranks]
            pairs = [f"--num_rollouts {_nearest(buffer, size)} --batch_size {size}" for size in fitting]
            verb = "does" if len(bad) == 1 else "do"
            raise UserError(
                f"{' and '.join(bad)} {verb} not divide by the {num_ranks} processes; pass {' or '.join(pairs)}"
            )
        size = self.num_responses_per_prompt
        self._fit_groups(size * num_ranks, f"{num_ranks} processes get whole groups of {size} responses")

    def fit_prompts(self, num_prompts: int, world_size: int) -> None:
        """Lowers default sizes to the number of prompts. Raises UserError for an explicit --num_rollouts."""
        reason, unit = f"there are {num_prompts} prompts", self.num_responses_per_prompt * world_size
        most = num_prompts * self.num_responses_per_prompt
        if unit <= most < min(self.num_rollouts, math.lcm(self.batch_size, unit)):
            replace_default(self, "batch_size", most // unit * unit, reason)
        least = math.lcm(self.batch_size, unit)
        if self.num_rollouts > most >= least:
            replace_default(self, "num_rollouts", most // least * least, reason)
        if self.num_rollouts > most:
            problem = f"--num_rollouts {self.num_rollouts} needs more prompts than the {num_prompts} of --data_path"
            raise UserError(
                f"{problem} {' '.join(self.data_path)}: lower it (to a multiple of --batch_size), or add prompts"
            )

    @property
    def num_prompts(self) -> int:
        """Prompts of a buffer."""
        return self.num_rollouts // self.num_responses_per_prompt

    @property
    def has_critic(self) -> bool:
        """Whether the estimator uses the values of a critic."""
        return "values" in needs_of(self.advantage_estimator)

    @property
    def preset_values(self) -> dict:
        """Values that --preset gives to flags, in place of their defaults."""
        return PRESETS[self.preset]

    @property
    def total_steps(self) -> int:
        """Steps of the loop, critic pre-training included."""
        return self.critic_pretrain_steps + self.train_steps

    @property
    def reward_paths(self) -> list[str]:
        """The reward models that score: --critic_model_path unless --reward_model_path or --reward_fn is given."""
        return self.reward_model_path or ([] if self.reward_fn else [self.critic_model_path])

    @property
    def reward_flag(self) -> str:
        """The flag that names them."""
        return "--reward_model_path" if self.reward_model_path else "--critic_model_path"

    def _check_numbers(self) -> None:
        for name in ("lr", "critic_lr"):
            if not getattr(self, name):
                raise UserError(f"--{name} 0 trains nothing: pass a positive number")
        check_range(
            self, train_steps=(1, None), num_rollouts=(1, None), batch_size=(1, None), ppo_epochs=(1, None),
            save_per_step=(1, None), ppo_pretrain_batch_size=(1, None), warmup_steps=(0, None), lr=(0, None),
            critic_lr=(0, None), gamma=(0, 1), lam=(0, 1), temperature=(0.01, None), topp=(1e-6, 1),
            repetition_penalty=(0.01, None), kl_penalty_weight=(0, None), reward_clip=(0, None), pg_clip=(0, None),
            value_clip=(0, None), advantage_clip=(0, None), entropy_clip=(0, None), entropy_loss_weight=(0, None),
            ppo_pretrain_loss_weight=(0, None), vf_loss_weight=(0, None), missing_eos_penalty=(0, None),
            critic_pretrain_steps=(0, None), critic_init_scale=(0, None), num_eval_prompts=(0, None),
            num_samples=(0, None), best_max_kl=(0, None), skip_bad_batches=(0, None), alarm_kl=(0, None),
            alarm_perplexity=(0, None), alarm_eos=(0, 1), alarm_length=(0, None), alarm_score_std=(0, None),
            num_responses_per_prompt=(1, None),
            critic_lora_rank=(0, None), critic_lam=(0, 1),
            length_alpha=(1e-6, None), max_refills=(0, None), kl_target=(0, None),
            kl_horizon=(1, None), overlong_buffer=(0, None), overlong_length=(0, None), overlong_penalty=(0, None),
            critic_epochs=(0, None), critic_updates_per_policy_update=(1, None), dual_clip=(0, None),
            reference_decay=(0, 1), reference_interval=(1, None), policy_ema=(0, 0.999999),
            plan_gpus=(0, None), plan_gpu_memory=(0, None), plan_network=(0, None),
        )  # fmt: skip
        if self.on_collapse == "rollback" and not self.checkpoint_per_step:
            raise UserError("--on_collapse rollback needs checkpoints: pass --checkpoint_per_step above 0")
        if self.use_ppo_pretrain_loss and not self.ppo_pretrain_data_path:
            raise UserError("--use_ppo_pretrain_loss needs dialogues: pass --ppo_pretrain_data_path")
        for switch, amount in AMOUNTS.items():
            if getattr(self, switch) and not getattr(self, amount):
                raise UserError(f"--{switch} with --{amount} 0 does nothing: pass more than 0, or --{switch} false")
        if self.reuse_sampler_logprobs and (self.topp < 1.0 or self.repetition_penalty != 1.0):
            raise UserError(
                f"--reuse_sampler_logprobs with --topp {self.topp:g} --repetition_penalty {self.repetition_penalty:g}: "
                "the sampler's log-probabilities are the policy's only at 1 and 1; pass these, or drop the flag"
            )
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise UserError("--kl_in loss needs --kl_estimator k2 or k3: the gradient of k1 is 0 on average")

    @property
    def reads_critic(self) -> bool:
        """Whether the model of --critic_model_path is loaded: as critic, or as the reward model."""
        return self.has_critic or self.critic_model_path in self.reward_paths

    @property
    def needs_baselines(self) -> bool:
        """Whether the estimator compares with greedy responses."""
        return "baselines" in needs_of(self.advantage_estimator)

    def check_world(self, world_size: int, vocab_size: int) -> None:
        """Checks that need the number of ranks and the size of the vocabulary. Raises UserError."""
        self._fit_ranks(world_size)
        if self.use_entropy_loss and self.entropy_clip > math.log(vocab_size):
            limit = f"entropy is at most ln({vocab_size}) = {math.log(vocab_size):.2f}"
            raise UserError(f"--entropy_clip {self.entropy_clip:g} can never be reached: {limit}; lower it")
