"""Align a language model with PPO-max: prompts -> rollout -> scores -> experience -> update.

`python train_ppo.py ...` runs one process; a launcher, such as deepspeed, runs this file on every rank.
"""

import contextlib
import sys

from ppo.config import AMOUNTS, PRESETS, PPOConfig
from utils.flags.parser import entry_point, parse_args
from utils.watchdog import Watchdog


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Runs PPO, or prints a plan (--plan). Flags are checked before torch and deepspeed are imported."""
    config = parse_args(PPOConfig, argv, PRESETS, AMOUNTS)
    if config.plan:
        from ppo.planning.report import print_plan

        print_plan(config)
        return
    with Watchdog(config.hang_timeout):
        from utils.deterministic import repeatable
        from utils.run.lock import held

        with repeatable(config.deterministic), held:
            train(config)


def train(config: PPOConfig) -> None:
    """Builds the run, runs the loop and writes the final model. Every rank does the same number of steps."""
    from ppo.build import build
    from utils.distributed import is_main
    from utils.engine.engine import shutdown_distributed
    from utils.run.together import together

    run = build(config)
    # Closing the logger ends its progress line, so that an error starts on a new one.
    with together(), contextlib.closing(run.logger), run.lifecycle:
        loop(run)
        if run.finished:
            run.export_final()
    ends = is_main()
    shutdown_distributed()
    if ends:
        run.end()
    if run.lifecycle.exit_code:
        sys.exit(run.lifecycle.exit_code)


def loop(run) -> None:
    """Does the steps of a `ppo.run.Run` that are left, until the last one or a signal to stop."""
    from ppo.buffer import fill_buffer
    from ppo.experience import experience_metrics, make_experience, negative_kl_warning, rollout_metrics
    from ppo.groups import uniform_fraction
    from ppo.update import update
    from utils.run.logger import Stopwatch

    config, state, models = run.config, run.state, run.models
    run.finish_stopped_step()
    while not (run.finished or run.lifecycle.exit_code):
        lr = run.learning_rates(state.step)
        watch = Stopwatch(on_lap=run.logger.lap)

        # 1. Sample responses to each prompt.  2. Compute log-probabilities, values and reward scores, and gather the
        # buffer on every rank (it is small). A signal abandons both; the resumed run repeats them.
        run.lifecycle.begin(state.state_dict(), run.logger.say)
        buffer = fill_buffer(run, watch)
        if buffer is None:
            continue
        rollout, scores, kept = buffer

        # 3. Compute rewards, advantages and returns.
        experience = make_experience(rollout.rows(kept), scores.rows(kept), state.moments, config, state.kl_coef)
        experience = run.fit_critic(experience)

        # 4. Train policy and critic: epochs over the buffer, one optimizer step of each per minibatch.
        metrics = update(
            models.policy, models.critic, experience, config, state.step, lr["policy"], lr["critic"], state.pretrain,
            run.leave_out, state.kl_coef,
        )  # fmt: skip
        watch.lap("update")

        state.step += 1
        run.update_averages()
        metrics |= rollout_metrics(rollout, scores) | experience_metrics(experience, config)
        metrics |= run.adapt_kl(metrics["kl_ref"], len(rollout))
        metrics |= {f"lr_{name}": lr[name] for name in models.engines()}
        if config.num_responses_per_prompt > 1:
            metrics["uniform_group_fraction"] = uniform_fraction(scores)
        metrics |= watch.metrics(samples=len(rollout), tokens=int(rollout.response_mask.sum()))
        if warning := negative_kl_warning(scores):
            run.logger.say(warning)

        # 5. Write metrics and samples; evaluate, save a checkpoint, stop after a signal.
        run.after_step(rollout, scores, metrics)


if __name__ == "__main__":
    main()
