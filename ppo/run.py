"""A PPO run: its parts, and what happens between two steps of the loop."""

from dataclasses import dataclass, field
from typing import NoReturn

import torch

from data.encoded import Mixture
from data.prompts import Prompt
from ppo.alarms import MAX_ROLLBACKS, alarms, is_best
from ppo.config import PPOConfig
from ppo.decoding.sampling import Sampling
from ppo.evaluate import evaluate, sample_rows
from ppo.experience import score_problem
from ppo.fit_critic import normalise_values, restore_unit, scale_values
from ppo.kl import adapted
from ppo.models import Models
from ppo.ranks import own_share
from ppo.reference import Averages, move_reference, update_averages
from ppo.report import judge
from ppo.rollout import Sampler
from ppo.sampler_gap import sampler_problem
from ppo.state import RunState
from ppo.types import Batch, Experience, PromptBatch, Rollout, Scores
from ppo.user_reward import UserReward
from utils.distributed import barrier, is_main
from utils.engine.average import WeightAverage
from utils.errors import UserError
from utils.models.export import save_causal_lm, save_lm_adapter
from utils.notices import notify
from utils.run.checkpoint import save_batches
from utils.run.ending import end_run
from utils.run.export import export_models
from utils.run.lifecycle import RunLifecycle
from utils.run.logger import RunLogger
from utils.schedule import lr_factor
from utils.watchdog import report_progress


@dataclass
class Run:
    """The parts of a run. After `build`, only `state` and the engines change."""

    config: PPOConfig
    tokenizer: object
    prompts: Mixture[Prompt]
    eval_prompts: list[Prompt]
    models: Models
    sampler: Sampler
    sampling: Sampling
    reward_fn: UserReward | None
    logger: RunLogger
    state: RunState
    lifecycle: RunLifecycle
    averages: Averages = field(default_factory=dict)
    notified: set[str] = field(default_factory=set)  # metrics of the last step's alarms

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.state.step >= self.config.total_steps

    @property
    def policy_steps(self) -> int:
        """How many of the steps that are done have trained the policy; 0 or less while only the critic trains."""
        return self.state.step - self.config.critic_pretrain_steps

    def next_prompts(self) -> PromptBatch:
        """Returns this rank's share of the next prompts, each with its place in the run and a row per response."""
        start, count = self.state.next_place, self.config.num_prompts
        self.state.next_place += count
        places = list(range(start, self.state.next_place))
        return own_share(self.prompts.take(start, count), places, self.config.num_responses_per_prompt)

    def learning_rates(self, step: int) -> dict[str, float]:
        """Returns {"policy": learning rate, "critic": learning rate} of a step, counted from 0.

        While only the critic trains, the policy's is 0 and the critic's warms up over a tenth of these steps. It stays
        at --critic_lr while the policy warms up, and then decays with the policy's.
        """
        config, alone = self.config, self.config.critic_pretrain_steps
        if step < alone:
            return {"policy": 0.0, "critic": config.critic_lr * min(1.0, (step + 1) / max(1, alone // 10))}

        def factor(at: int) -> float:
            return lr_factor(at, config.warmup_steps, config.train_steps, config.lr_schedule)

        at = step - alone
        critic_at = max(at, config.warmup_steps - 1) if alone else at
        return {"policy": config.lr * factor(at), "critic": config.critic_lr * factor(critic_at)}

    def adapt_kl(self, kl: float, samples: int) -> dict[str, float]:
        """Adapts the weight of the KL penalty to --kl_target. Returns the weight that this step had, as `kl_coef`."""
        config, state = self.config, self.state
        if not config.kl_target:
            return {}
        coef = config.kl_penalty_weight if state.kl_coef is None else state.kl_coef
        if self.policy_steps > 0:
            state.kl_coef = adapted(coef, kl, config.kl_target, samples, config.kl_horizon)
        return {"kl_coef": coef}

    def fit_critic(self, experience: Experience) -> Experience:
        """Fits the critic's values to the returns, once and under --value_norm; returns new experience. Collective."""
        if self.models.critic is None:
            return experience
        return normalise_values(self, scale_values(self, experience))

    def check_sampler(self, rollout: Rollout, scores: Scores) -> None:
        """Raises UserError if another engine's samples are not the policy's (`sampler_problem`). Collective."""
        if problem := sampler_problem(rollout, scores, self.sampler, self.config, self.config.temperature):
            self._fail(f"step {self.state.step + 1}: {problem}")

    def refuses(self, rollout: Rollout, scores: Scores, own: torch.Tensor) -> bool:
        """Whether the buffer is left out for a bad score; the step then takes new prompts. own: this rank's scores."""
        problem = score_problem(scores, self.config.explosion_limit, own)
        if problem:
            self.leave_out(problem, rollout, scores)
        return problem is not None

    def leave_out(self, problem: str, *batches: Batch) -> None:
        """Saves and counts a bad batch, the same on all ranks. UserError if there are more than --skip_bad_batches."""
        config, state = self.config, self.state
        state.left_out += 1
        path = f"{config.model_save_path}/bad_batches/step_{state.step + 1}_{state.left_out}.safetensors"
        where = f"step {state.step + 1}, batch in {path}"
        if is_main() and (refusal := save_batches(path, batches)):
            where = f"step {state.step + 1}, batch not saved: {refusal}"
        barrier()  # a launcher kills all ranks when one ends, which must not happen while rank 0 writes the batch
        text = f"{problem} [{where}]"
        if state.left_out > config.skip_bad_batches:
            self._fail(text)
        self.logger.say(f"warning: {text}; left out, {state.left_out} of --skip_bad_batches {config.skip_bad_batches}")

    def update_averages(self) -> None:
        """Updates averaged weights and a moving reference after a step that trained the policy. Collective."""
        if self.averages and self.policy_steps > 0:
            update_averages(self.averages, self.models, self.config, self.policy_steps)

    def export_final(self) -> None:
        """Writes final/, and final_ema/ with --policy_ema. Raises UserError if one cannot be written. Collective."""
        self.export("final")
        if average := self.averages.get("policy_ema"):
            self.export("final_ema", average, {"step": self.state.step})  # it was not evaluated

    def export(
        self, name: str, average: WeightAverage | None = None, metrics: dict[str, float] | None = None
    ) -> bool:  # fmt: skip
        """Writes the policy, or an average, to the run's folder `name`, and returns True. Collective; rank 0 writes.

        metrics: for the model card, with their `step`; None: those of the run's last step.
        If best/ cannot be written, it stays as it was, a warning is printed, and False is returned. For others this
        raises UserError.
        """
        policy, lm = self.models.policy, self.models.policy.module.lm
        state = policy.full_state_dict() if self.config.export != "adapter" else {}
        if average:
            found = ((key, x) for key, x in average.whole(lm.dtype) if is_main())
            state |= {key: x.cpu() for key, x in found if key in state}
        state = {key.removeprefix("lm."): value for key, value in state.items()}

        def save(folder: str) -> None:
            save_causal_lm(lm.config, state, folder, self.tokenizer, lm.generation_config)

        def save_adapter(folder: str) -> None:
            path = self.config.policy_model_path
            save_lm_adapter(policy.module, policy.module.decoder, lm, path, folder, self.tokenizer)

        problem = export_models(self.config, name, self.tokenizer, save, save_adapter, metrics)
        if problem and name != "best":
            raise UserError(problem)
        if problem:
            self.logger.say(f"warning: {name}/ of step {self.state.step} was not saved: {problem}")
        return problem is None

    def end(self) -> None:
        """Writes report.html, says where everything is, and uploads final/ of a complete run. Call it on rank 0."""
        end_run(self.config, self.logger.say, judge, self.finished and not self.lifecycle.exit_code)

    def _fail(self, text: str) -> NoReturn:
        """Stops all ranks with an error, after the checkpoint and the report are written. Collective."""
        self.lifecycle.finish_checkpoint()
        if is_main():
            end_run(self.config, self.logger.say, judge, is_finished=False)
        barrier()  # a launcher kills all ranks when one ends
        raise UserError(text)

    def after_step(self, rollout: Rollout, scores: Scores, metrics: dict[str, float]) -> None:
        """Evaluates, exports best/, writes metrics, samples and a checkpoint, or rolls back. Collective."""
        self.state.unfinished = {"metrics": metrics, "samples": self._texts(rollout, scores)}
        self._finish_step()

    def finish_stopped_step(self) -> None:
        """Finishes the step in whose evaluation the run was stopped, if it was, before it resumed. Collective."""
        if self.state.unfinished:
            self.logger.rewind(self.state.step - 1)
            self._finish_step()

    def _finish_step(self) -> None:
        config, step = self.config, self.state.step
        metrics, samples = self.state.unfinished["metrics"], self.state.unfinished["samples"]
        signs = alarms(metrics, config)
        self.logger.show(step, metrics)
        if self.eval_prompts and (step % config.save_per_step == 0 or step == config.total_steps):
            # With an alarm it is not abandoned: a rollback must not find a checkpoint of this step.
            self.lifecycle.begin(None if signs else self.state.state_dict(), self.logger.say)
            metrics = metrics | self.evaluate(may_be_best=not signs)
        if config.skip_bad_batches:
            metrics = metrics | {"bad_batches": self.state.left_out}
        if config.on_collapse == "rollback":
            metrics = metrics | {"rollbacks": self.state.rollbacks}
        self.logger.metrics(step, metrics)
        self.logger.samples(step, samples)
        self.logger.advance()
        self.state.unfinished = None
        if not self._collapses(signs):
            self.lifecycle.after_step(self.state.state_dict(), self.logger.say)

    def _collapses(self, signs: list[str]) -> bool:
        """Prints alarms; returns whether --on_collapse rollback restored the last checkpoint. Collective.

        Prompts and random streams are not reset, since they would lead to the same collapse. Neither is best/.
        """
        config, state = self.config, self.state
        names = {sign.partition(" ")[0] for sign in signs}
        self.notified &= names
        if not signs:
            return False
        text = f"step {state.step} looks like a collapse: {'; '.join(signs)}"
        start = None
        if names - self.notified:  # not once more for each step that goes on like this
            notify("alarm", text)
        self.notified = names
        if config.on_collapse == "rollback" and state.rollbacks < MAX_ROLLBACKS:
            start = self.lifecycle.newest_checkpoint(self.logger.say)
        if config.on_collapse == "stop" or (config.on_collapse == "rollback" and not start):
            self._fail(f"{text} (--on_collapse {config.on_collapse}, {state.rollbacks} rollbacks)")
        self.logger.say(f"warning: {text}")
        if not start:
            return False
        kept = {"next_place": state.next_place, "best_score": state.best_score, "rollbacks": state.rollbacks + 1}
        kept["unfinished"] = None  # that step was finished after the run had resumed
        self.lifecycle.restore(start, config.seed)
        state.load_state_dict(start.state | kept)
        restore_unit(self.models.critic, state)
        move_reference(self.averages, self.models)
        self.logger.rewind(state.step)
        self.logger.say(f"back at step {state.step}, rollback {state.rollbacks} of {MAX_ROLLBACKS}, with new prompts")
        return True

    def evaluate(self, may_be_best: bool) -> dict[str, float]:
        """Returns metrics on held-out prompts, keys `eval_...`; exports best/ if they are the best. Collective."""
        metrics, rows = evaluate(
            self.eval_prompts, self.sampler, self.models, self.reward_fn, self.tokenizer, self.config
        )
        report_progress("evaluation")
        better = may_be_best and is_best(metrics, self.state.best_score, self.config.best_max_kl)
        self.logger.say(
            f"step {self.state.step}: held-out score {metrics['score_mean']:.3f}, KL {metrics['kl_ref']:.2f}, "
            f"length {metrics['response_length']:.1f}" + (" (best so far)" if better else "")
        )
        self.logger.samples(self.state.step, [{"held_out": True, **row} for row in rows[: self.config.num_samples]])
        counted = metrics | {"num_prompts": len(self.eval_prompts)}
        held_out = {f"eval_{key}": value for key, value in counted.items()}
        if better and self.export("best", metrics={"step": self.state.step, **held_out}):
            self.state.best_score = metrics["score_mean"]
        return held_out

    def _texts(self, rollout: Rollout, scores: Scores) -> list[dict]:
        """Returns the buffer's first samples, which are the same on any number of ranks."""
        first = slice(self.config.num_samples)
        rollout, scores = rollout.rows(first), scores.rows(first)
        return sample_rows(rollout, scores, self.tokenizer)
