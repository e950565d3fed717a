"""Judging a policy on held-out prompts: sample as the paper does, score, and keep the texts."""

from dataclasses import replace

from data.prompts import Prompt
from data.template import decode_answer
from ppo.config import PPOConfig
from ppo.decoding.sampling import Sampling
from ppo.experience import check_scores, rollout_metrics
from ppo.models import Models
from ppo.ranks import gather_batches, own_share
from ppo.rollout import generate, response_ids
from ppo.score import RewardFunction, score
from utils.distributed import world_size

EVALUATION_SEED = 1 << 40  # keeps the random streams of evaluations away from those of training


def evaluate(
    prompts: list[Prompt], models: Models, reward_fn: RewardFunction | None, tokenizer, config: PPOConfig,
    sampling: Sampling,
) -> tuple[dict[str, float], list[dict]]:  # fmt: skip
    """(metrics over all prompts, a row a prompt: prompt, answer, score, kl, length, nll). The same on every rank.

    Each prompt has one random stream for the whole run, so evaluations can be compared prompt by prompt. Where ranks
    do not divide the prompts, some are sampled twice and counted once.
    """
    padded = prompts + prompts[: -len(prompts) % world_size()]
    padded += [prompts[0]] * (-len(padded) % world_size())
    share = own_share(padded, list(range(len(padded))))
    rollout = generate(models.policy, share, sampling, config.seed + EVALUATION_SEED, tokenizer, config)
    judges = replace(models, critic=None)  # nobody asks for values here
    scores = score(rollout, share, judges, reward_fn, tokenizer, sampling.temperature, config)
    count = slice(len(prompts))
    own = scores.scores
    rollout, scores = (batch.rows(count) for batch in gather_batches(share, rollout, scores))
    check_scores(scores.scores, config.explosion_limit, own)
    lengths = rollout.response_mask.sum(1)
    columns = {
        "score": scores.scores,
        "kl": (scores.old_logprobs - scores.ref_logprobs).sum(1),
        "length": lengths,
        "nll": -scores.old_logprobs.sum(1) / lengths.clamp(min=1),
    }
    numbers = {name: column.tolist() for name, column in columns.items()}
    rows = [
        {
            "prompt": prompt.turns[-1]["content"],
            "answer": decode_answer(tokenizer, ids),
            **{name: column[i] for name, column in numbers.items()},
        }
        for i, (prompt, ids) in enumerate(zip(prompts, response_ids(rollout), strict=True))
    ]
    return rollout_metrics(rollout, scores), rows


class BestRule:
    """Which evaluation's policy is kept as best/: the highest mean score whose KL to the reference stays in bounds.

    The score alone is what the paper shows to mislead, so one that was bought with too much KL does not count.
    """

    def __init__(self, max_kl: float):
        self.max_kl = max_kl
        self.best_score = float("-inf")

    def __str__(self) -> str:
        return f"best/ = highest eval_score_mean with eval_kl_ref of at most {self.max_kl:g} nats (--best_max_kl)"

    def improves(self, metrics: dict[str, float]) -> bool:
        """True when these evaluation metrics are the best so far; remembers them."""
        better = metrics["kl_ref"] <= self.max_kl and metrics["score_mean"] > self.best_score
        if better:
            self.best_score = metrics["score_mean"]
        return better
