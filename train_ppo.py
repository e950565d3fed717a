"""Align a language model with PPO-max: prompts -> rollout -> scores -> experience -> update.

`python train_ppo.py ...` is one process; under `deepspeed` the same file runs on every rank. Flags: ppo/config.py.
"""

import contextlib
import sys

from ppo.config import AMOUNTS, PRESETS, PPOConfig
from utils.flags.parser import entry_point, parse_args


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Command line in, a run's folder out. A wrong flag is answered before torch and deepspeed are loaded."""
    config = parse_args(PPOConfig, argv, PRESETS, AMOUNTS)
    if config.plan:
        from ppo.planning.plan import print_plan

        print_plan(config)
    else:
        from utils.deterministic import repeatable

        with repeatable(config.deterministic):
            train(config)


def train(config: PPOConfig) -> None:
    """The whole job: build, the loop, the final model. Every rank runs it, with the same number of steps."""
    from ppo.build import build
    from utils.engine.engine import shutdown_distributed

    run = build(config)
    # The logger is closed when a run fails too, so that the reason gets a line of its own.
    with contextlib.closing(run.logger), run.lifecycle:
        loop(run)
        if run.finished:
            run.export("final")
    shutdown_distributed()
    if not run.finished:
        sys.exit(run.lifecycle.exit_code)


def loop(run) -> None:
    """PPO over a `ppo.run.Run`, from the step that its state is at to the last one, or to where it is stopped."""
    from ppo.decoding.sampling import Sampling
    from ppo.experience import experience_metrics, make_experience, negative_kl_warning, rollout_metrics
    from ppo.ranks import gather_batches
    from ppo.rollout import generate
    from ppo.score import score
    from ppo.update import update
    from utils.run.logger import Stopwatch

    config, state, models = run.config, run.state, run.models
    sampling = Sampling(config.temperature, config.topp, config.repetition_penalty)
    while not (run.finished or run.lifecycle.exit_code):
        lr, critic_lr = run.learning_rates(state.step)
        watch = Stopwatch(on_lap=run.lifecycle.report_progress)

        # 1. Sample a response to each prompt.
        prompts = run.next_prompts()
        measure = config.reuse_sampler_logprobs
        rollout = generate(models.policy, prompts, sampling, config.seed, run.tokenizer, config, measure)
        watch.lap("rollout")

        # 2. What policy, reference, critic and reward model say of them.
        scores = score(rollout, prompts, models, run.reward_fn, run.tokenizer, sampling.temperature, config)
        watch.lap("score")

        # 3. Small next to the models, so every rank gets all of it; from here on ranks differ only in their work.
        own_scores = scores.scores
        rollout, scores = gather_batches(prompts, rollout, scores)
        if run.refuses(rollout, scores, own_scores):
            continue
        experience = run.fit_critic(make_experience(rollout, scores, state.moments, config))

        # 4. Epochs over the buffer, minibatches, a step of the policy and one of the critic each.
        metrics = update(
            models.policy, models.critic, experience, config, state.step, lr, critic_lr, state.pretrain, run.leave_out
        )
        watch.lap("update")

        state.step += 1
        metrics |= rollout_metrics(rollout, scores) | experience_metrics(experience)
        metrics |= {"lr_policy": lr, "lr_critic": critic_lr}
        metrics |= watch.metrics(samples=len(rollout), tokens=int(rollout.response_mask.sum()))
        if warning := negative_kl_warning(rollout, scores):
            run.logger.say(warning)

        # 5. What is watched, and what a kill may not take away; a signal ends the run here.
        run.after_step(rollout, scores, metrics)


if __name__ == "__main__":
    main()
