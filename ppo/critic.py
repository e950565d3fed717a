"""Train a critic before PPO:   python -m ppo.critic --pretrain --policy_model_path … --critic_model_path …

Samples responses of a policy that does not change, and trains the critic on their returns (λ = 1). `final/` in the
folder of the run is the --critic_model_path of train_ppo.py, with --critic_pretrain_steps 0 or a few.
"""

import sys
from dataclasses import dataclass

from ppo.config import AMOUNTS, PRESETS, PPOConfig
from utils.errors import UserError
from utils.flags.checks import check_range, choose
from utils.flags.fields import Common
from utils.flags.parser import entry_point, parse_args
from utils.watchdog import Watchdog


@dataclass
class CriticConfig(PPOConfig):
    """Train a critic on responses of the policy, which does not change, before PPO.

    All flags of train_ppo.py, so that responses and rewards are those that PPO starts from; those of the policy's
    update have no effect. It makes --critic_pretrain_steps buffers
    """

    trains, base_flag = "critic", "critic_model_path"
    hint = "see --help"

    pretrain: Common[bool] = False
    """Train the critic; needed, as the command does nothing else"""
    target_explained_variance: Common[float] = 0.0
    """Stop as soon as the explained variance on the held-out prompts reaches this, measured every --save_per_step
    buffers; 0: make all buffers"""
    critic_pretrain_steps: Common[int] = 100
    """Buffers of --num_rollouts responses to train on, each with --critic_epochs passes, without value clipping"""
    model_save_path: Common[str] = "outputs/critic"
    """Folder of the run: config.json, metrics.jsonl, samples.jsonl, checkpoints/, final/"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.pretrain:
            raise UserError("--pretrain is missing: pass it to train the critic")
        if not self.has_critic:
            raise UserError(f"--advantage_estimator {self.advantage_estimator} has no critic to train; use gae")
        if not self.num_eval_prompts:
            raise UserError("--num_eval_prompts 0: the critic is measured on held-out prompts; pass 1 or more")
        check_range(self, critic_pretrain_steps=(1, None), target_explained_variance=(0, 1))
        for name, value in (("advantage_estimator", "gae"), ("lam", 1.0)):
            if getattr(self, name) != value:
                choose(self, name, value, "the critic learns returns that do not depend on its values")

    @property
    def total_steps(self) -> int:
        """Steps of the loop: the policy has none."""
        return self.critic_pretrain_steps


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Trains the critic, or prints a plan (--plan). Flags are checked before torch and deepspeed are imported."""
    config = parse_args(CriticConfig, argv, PRESETS, AMOUNTS)
    if config.plan:
        from ppo.planning.report import print_plan

        print_plan(config)
        return
    with Watchdog(config.hang_timeout):
        from ppo.critic_pretraining import pretrain
        from utils.deterministic import repeatable
        from utils.run.lock import held

        with repeatable(config.deterministic), held:
            exit_code = pretrain(config, config.target_explained_variance)
    if exit_code:
        sys.exit(exit_code)


if __name__ == "__main__":
    main()
