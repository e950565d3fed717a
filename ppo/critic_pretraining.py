"""Trains a critic alone, on responses of a policy that does not change, and measures it on held-out prompts."""

import contextlib
import copy
from dataclasses import dataclass, replace

from ppo.advantages import gae
from ppo.buffer import sample_and_score
from ppo.build import build
from ppo.config import PPOConfig
from ppo.critic_metrics import critic_metrics, explained_variance
from ppo.evaluate import EVALUATION_SEED
from ppo.experience import as_floats, experience_metrics, make_experience, rollout_metrics
from ppo.ranks import gather_batches, own_share
from ppo.run import Run
from ppo.score import critic_values, score
from ppo.types import PromptBatch, Rollout, Scores
from ppo.update import update
from reward.model import check_scalar_export, save_scalar_adapter, save_scalar_model
from utils.distributed import is_main, world_size
from utils.engine.engine import shutdown_distributed
from utils.errors import UserError
from utils.run.export import export_models
from utils.run.logger import Stopwatch
from utils.run.together import together
from utils.watchdog import report_progress


@dataclass
class Pretraining(Run):
    """A run that ends after the critic's pre-training, or as soon as the critic explains `target` (0: no target)."""

    target: float = 0.0
    reached: bool = False
    held_out: tuple[PromptBatch, Rollout, Scores] | None = None  # this rank's

    @property
    def finished(self) -> bool:
        """Whether the pre-training has ended."""
        return self.reached or self.state.step >= self.config.critic_pretrain_steps

    def _sample_held_out(self) -> tuple[PromptBatch, Rollout, Scores]:
        """Returns this rank's responses to the held-out prompts, sampled as in training, with scores. Collective."""
        padded = self.eval_prompts + [self.eval_prompts[0]] * (-len(self.eval_prompts) % world_size())
        share = own_share(padded, list(range(len(padded))))
        rollout = self.sampler(share, self.sampling, self.config.seed + EVALUATION_SEED)
        temperature = self.config.temperature
        scores = score(
            rollout, share, self.models, self.reward_fn, self.tokenizer, temperature, self.config, with_values=False
        )
        return share, rollout, scores

    def evaluate(self, may_be_best: bool = False) -> dict[str, float]:
        """Returns explained variance, slope and bias on held-out prompts, keys `eval_...`; sets `reached`. Collective.

        The responses are sampled once. Their returns (λ = 1) are normalised as those of the next buffer would be.
        """
        self.held_out = self.held_out or self._sample_held_out()
        share, rollout, scores = self.held_out
        values = critic_values(self.models.critic, rollout, self.config)
        gathered = gather_batches(share, rollout, replace(scores, old_values=values))
        rows = (batch.rows(slice(len(self.eval_prompts))) for batch in gathered)
        experience = make_experience(*rows, copy.deepcopy(self.state.moments), self.config)
        values, mask = experience.old_values, experience.response_mask
        returns = gae(experience.rewards, values, mask, self.config.gamma, lam=1.0)[1]
        found = {"explained_variance": explained_variance(returns[mask], values[mask])}
        metrics = as_floats(found | critic_metrics(returns, values, mask))
        report_progress("evaluation")
        result = metrics["explained_variance"]
        self.reached = bool(self.target) and result >= self.target
        note = f", the target of {self.target:g} is reached" if self.reached else ""
        self.logger.say(f"step {self.state.step}: held-out explained variance {result:.4f}{note}")
        return {f"eval_{name}": value for name, value in metrics.items()}

    def export(self, name: str) -> bool:
        """Writes the critic to the run's folder final/, and returns True. Collective; rank 0 writes."""
        critic, config = self.models.critic, self.config
        state = critic.full_state_dict() if config.export != "adapter" else {}

        def save(folder: str) -> None:
            save_scalar_model(critic.module, folder, state, self.tokenizer, value_pretrained=True)

        def save_adapter(folder: str) -> None:
            path = config.critic_model_path
            save_scalar_adapter(critic.module, path, folder, self.tokenizer, value_pretrained=True)

        if problem := export_models(config, name, self.tokenizer, save, save_adapter):
            raise UserError(problem)
        return True


def pretrain(config: PPOConfig, target: float) -> int:
    """Trains, measures before, meanwhile and after, and writes final/. Returns the exit code. Collective."""
    run = Pretraining(**vars(build(config)), target=target)
    with together(), contextlib.closing(run.logger), run.lifecycle:
        check_scalar_export(run.models.critic.module, f"--critic_model_path {config.critic_model_path}")
        run.lifecycle.begin(run.state.state_dict(), run.logger.say)
        first = run.evaluate()
        if run.state.step == 0:
            run.logger.metrics(0, first)
        loop(run)
        if run.finished:
            run.export("final")
    ends = is_main()
    shutdown_distributed()
    if ends:
        run.end()
    return run.lifecycle.exit_code


def loop(run: Run) -> None:
    """Does the steps of the critic that are left, until the last one or a signal to stop: `loop` of train_ppo.py."""
    config, state, models = run.config, run.state, run.models
    run.finish_stopped_step()
    while not (run.finished or run.lifecycle.exit_code):
        lr = run.learning_rates(state.step)["critic"]
        watch = Stopwatch(on_lap=run.logger.lap)
        run.lifecycle.begin(state.state_dict(), run.logger.say)
        found = sample_and_score(run, watch)
        if found is None:
            continue
        rollout, scores = found
        experience = run.fit_critic(make_experience(rollout, scores, state.moments, config))
        metrics = update(models.policy, models.critic, experience, config, state.step, 0.0, lr, on_bad=run.leave_out)
        watch.lap("update")
        state.step += 1
        metrics |= rollout_metrics(rollout, scores) | experience_metrics(experience, config) | {"lr_critic": lr}
        metrics |= watch.metrics(samples=len(rollout), tokens=int(rollout.response_mask.sum()))
        run.after_step(rollout, scores, metrics)
