"""The first half of a step: samples responses, scores them, and gathers them on every rank."""

import torch

from ppo.groups import concat, is_full, rows_to_train
from ppo.ranks import gather_batches
from ppo.run import Run
from ppo.score import score, with_greedy_scores
from ppo.types import Rollout, Scores
from utils.run.logger import Stopwatch


def sample_and_score(run: Run, watch: Stopwatch) -> tuple[Rollout, Scores] | None:
    """Samples responses to the next prompts and scores them. Returns those of all ranks, on every rank. Collective.

    None: a score is bad, and the responses were left out.
    """
    config = run.config
    prompts = run.next_prompts()
    rollout = run.sampler(prompts, run.sampling, config.seed)
    watch.lap("rollout")
    scores = score(rollout, prompts, run.models, run.reward_fn, run.tokenizer, config.temperature, config)
    if config.needs_baselines:
        scores = with_greedy_scores(scores, prompts, run)
    watch.lap("score")
    own_scores = scores.scores
    rollout, scores = gather_batches(prompts, rollout, scores)
    run.check_sampler(rollout, scores)
    return None if run.refuses(rollout, scores, own_scores) else (rollout, scores)


def fill_buffer(run: Run, watch: Stopwatch) -> tuple[Rollout, Scores, slice | torch.Tensor] | None:
    """Returns `sample_and_score`, repeated for uniform groups that are dropped, and the rows to train on. Collective.

    The rows are all without --drop_uniform_groups. None: a score is bad, and the step starts again.
    """
    config, parts = run.config, []
    max_refills = config.max_refills if config.drop_uniform_groups else 0
    while not parts or not is_full(parts, config.num_prompts, max_refills):
        part = sample_and_score(run, watch)
        if part is None:
            return None
        parts.append(part)
    rollout, scores = map(concat, zip(*parts, strict=True))
    return rollout, scores, rows_to_train(scores, config.num_prompts) if config.drop_uniform_groups else slice(None)
