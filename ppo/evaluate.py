"""Evaluation of a policy on held-out prompts: metrics and texts."""

from data.prompts import Prompt
from ppo.config import PPOConfig
from ppo.decoding.sampling import EVALUATION
from ppo.experience import rollout_metrics, score_problem
from ppo.models import Models
from ppo.ranks import gather_batches, own_share
from ppo.rollout import Sampler, prompt_texts, response_texts
from ppo.sampler_gap import sampler_problem
from ppo.score import score
from ppo.types import Rollout, Scores
from ppo.user_reward import UserReward
from utils.distributed import world_size
from utils.errors import UserError

EVALUATION_SEED = 1 << 40  # added to the seed, so that evaluations have other random streams than training


def evaluate(
    prompts: list[Prompt], sampler: Sampler, models: Models, reward_fn: UserReward | None, tokenizer,
    config: PPOConfig,
) -> tuple[dict[str, float], list[dict]]:  # fmt: skip
    """Returns (metrics, the `sample_rows`, one per prompt), the same on every rank.

    Answers are sampled as in the paper (`EVALUATION`), each prompt with the same random stream in all evaluations.
    Prompts that do not divide by the ranks are padded with repeated ones, which are not counted.
    """
    padded = prompts + [prompts[0]] * (-len(prompts) % world_size())
    share = own_share(padded, list(range(len(padded))))
    rollout = sampler(share, EVALUATION, config.seed + EVALUATION_SEED)
    scores = score(rollout, share, models, reward_fn, tokenizer, EVALUATION.temperature, config, with_values=False)
    count = slice(len(prompts))
    own = scores.scores
    rollout, scores = (batch.rows(count) for batch in gather_batches(share, rollout, scores))
    if problem := sampler_problem(rollout, scores, sampler, config, EVALUATION.temperature):
        raise UserError(f"evaluation: {problem}")
    if problem := score_problem(scores, config.explosion_limit, own):
        raise UserError(problem)
    return rollout_metrics(rollout, scores), sample_rows(rollout, scores, tokenizer)


def sample_rows(rollout: Rollout, scores: Scores, tokenizer) -> list[dict]:
    """Returns a row per response: prompt (as the model saw it), answer, `rows_of_scores`, length, kl, nll, ended.

    length: tokens, the end token included; kl: log π − log π_ref, summed over the response; nll: per token, nats.
    """
    lengths = rollout.response_mask.sum(1)
    columns = {
        "length": lengths,
        "kl": (scores.old_logprobs - scores.ref_logprobs).sum(1),
        "nll": -scores.old_logprobs.sum(1) / lengths.clamp(min=1),
        "ended": rollout.ended,
    }
    numbers = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [
        {"prompt": prompt, "answer": answer} | said | dict(zip(columns, row, strict=True))
        for prompt, answer, said, row in zip(
            prompt_texts(rollout, tokenizer), response_texts(rollout, tokenizer), scores.rows_of_scores(), numbers,
            strict=True,
        )
    ]  # fmt: skip
