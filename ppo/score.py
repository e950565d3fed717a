"""Scores finished responses: log-probabilities, values and reward scores. No gradients."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from data.batching.collate import micro_batches
from data.chat import TurnEnd, turn_end
from ppo.config import PPOConfig
from ppo.models import Models, PolicyModel
from ppo.rewards import per_token
from ppo.rollout import response_texts
from ppo.types import MeasuredRollout, PromptBatch, Rollout, Scores
from ppo.user_reward import UserReward
from reward.scoring.ensemble import Ensemble, score_ids
from utils.distributed import any_rank, gather_objects, world_size
from utils.engine.engine import TrainEngine
from utils.engine.state import same_weights
from utils.run import stop_signal
from utils.tensors import before, shift_to_next, to_device
from utils.tokenizer import template_of

GREEDY_TOPP = 1e-9  # the smallest nucleus, one token


@torch.no_grad()
def score(
    rollout: Rollout, prompts: PromptBatch, models: Models, reward_fn: UserReward | None,
    tokenizer, temperature: float, config: PPOConfig, with_values: bool = True,
) -> Scores:  # fmt: skip
    """Computes the `Scores` of a rollout, in forwards of at most micro_batch_tokens tokens, equally many on every rank.

    temperature: that of sampling, for log-probabilities. with_values: False leaves out the critic. The policy does no
    forward if the sampler measured the rollout, and the reference none while its weights equal the policy's. Raises
    Abandoned on all ranks, after a model's forwards or --reward_fn, if one of them got a signal to stop.
    """
    stop_signal.check()
    policy, critic = models.policy, models.critic
    policy.module.eval()
    if isinstance(rollout, MeasuredRollout):
        logprobs, entropy = rollout.old_logprobs, rollout.entropy
    else:
        logprobs, entropy = _by_batch(
            policy.module, rollout, config, lambda part: policy(part.sequences, part.response_mask, temperature)
        )
    with models.reference.resident() as reference:
        # Compared each time, since a resume or a rollback may have changed the policy too.
        moved = _differ(policy.module, reference)
        ref_logprobs = logprobs
        if any_rank(moved, logprobs.device):
            (ref_logprobs,) = _by_batch(
                reference, rollout, config,
                lambda part: reference(part.sequences, part.response_mask, temperature, with_entropy=False)[:1],
            )  # fmt: skip
    values = None
    if with_values and critic is not None:
        values = critic_values(critic, rollout, config)
    groups = to_device(torch.tensor(prompts.places), logprobs.device)
    return Scores(
        logprobs, ref_logprobs, entropy, values, groups=groups,
        **response_scores(rollout, prompts, models.reward, reward_fn, tokenizer, config.micro_batch_tokens),
    )  # fmt: skip


def _differ(policy: PolicyModel, reference: PolicyModel) -> bool:
    if policy.adapters:  # they share their frozen weights
        return not policy.is_unchanged()
    return not same_weights(policy, reference)


@torch.no_grad()
def critic_values(critic: TrainEngine, rollout: Rollout, config: PPOConfig) -> torch.Tensor:
    """Returns the critic's values of the response tokens, [batch, length]. As many forwards on every rank."""
    critic.module.eval()
    (values,) = _by_batch(
        critic.module, rollout, config,
        lambda part: (shift_to_next(critic(part.sequences, before(part.response_mask))),),
    )  # fmt: skip
    return values


def response_scores(
    rollout: Rollout, prompts: PromptBatch, reward: Ensemble | None, reward_fn: UserReward | None, tokenizer,
    max_tokens: int,
) -> dict:  # fmt: skip
    """Returns the fields of `Scores` that reward models and --reward_fn give to responses."""
    members, truncated = reward_scores(rollout, prompts, reward, tokenizer, max_tokens)
    scores = torch.zeros(len(rollout), device=rollout.sequences.device)
    failed, parts, names = None, None, ()
    if reward is not None:
        scores = reward.combine(members)
    if reward_fn is not None:
        answers = response_texts(rollout, tokenizer)
        said = stop_signal.interruptible(lambda: reward_fn(prompts.turns, answers, prompts.columns))
        stop_signal.check()
        scores = scores + torch.tensor(said.scores, device=scores.device)
        failed = torch.tensor(said.failed, device=scores.device)
        # Parts of a dict may differ between ranks; all take those of all.
        names = tuple(dict.fromkeys(name for found in gather_objects([*said.parts]) for name in found))
        columns = [said.parts.get(name, [None] * len(answers)) for name in names]
        parts = torch.tensor([[math.nan if x is None else x for x in column] for column in columns]).T.to(scores.device)
    return {
        "scores": scores, "member_scores": members, "truncated": truncated, "failed": failed, "parts": parts,
        "part_names": names,
    }  # fmt: skip


def with_greedy_scores(scores: Scores, prompts: PromptBatch, run) -> Scores:
    """Adds to each response the score of the greedy response to its prompt. Collective.

    Under --use_length_norm it is the score per token. Responses to a prompt whose greedy response has no score
    (--reward_fn) have `failed`.
    """
    config, size = run.config, run.config.num_responses_per_prompt
    first = prompts.first_members(size)
    sampling = replace(run.sampling, topp=GREEDY_TOPP)
    rollout = run.sampler(first, sampling, config.seed)
    found = response_scores(rollout, first, run.models.reward, run.reward_fn, run.tokenizer, config.micro_batch_tokens)
    failed = scores.failed
    if failed is not None:
        failed = failed | found["failed"].repeat_interleave(size)
    baselines = per_token(found["scores"], rollout.response_mask) if config.use_length_norm else found["scores"]
    return replace(scores, baselines=baselines.repeat_interleave(size), failed=failed)


def reward_scores(
    rollout: Rollout, prompts: PromptBatch, reward: Ensemble | None, tokenizer, max_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `member_scores` and `truncated` of `Scores`: the raw scores of one reward model after the other.

    A reward model with the policy's tokenizer and template reads the sampled ids; for another one the answers are
    decoded, and encoded again with their prompts. Every rank does the same number of forwards.
    """
    scores = truncated = torch.zeros(len(rollout), 0, device=rollout.sequences.device)
    members = reward.members if reward else []
    answers = response_texts(rollout, tokenizer) if any(member.encoding for member in members) else []
    for member in members:
        if member.encoding is None:
            ids = closed_ids(rollout, turn_end(tokenizer, template_of(tokenizer)), member.window)
        else:
            turns = [{"role": "assistant", "content": answer} for answer in answers]
            dialogues = ([*prompt, turn] for prompt, turn in zip(prompts.turns, turns, strict=True))
            ids, cut = zip(*map(member.encoding, dialogues), strict=True)
            truncated = torch.cat([truncated, torch.tensor(cut, device=truncated.device)[:, None]], 1)
        with member.model.resident() as model:
            batches = even_batches([len(row) for row in ids], max_tokens, model.joins_rows)
            scores = torch.cat([scores, score_ids(model, ids, batches)[:, None]], 1)
        stop_signal.check()
    return scores, truncated.bool()


def closed_ids(rollout: Rollout, end: TurnEnd, window: int | None = None) -> list[list[int]]:
    """Returns prompt and response of each row, ended as the template ends a turn; for the reward model only.

    It was trained on whole answers, so its score is defined at an end token only. The template's end replaces another
    stop id, and the last tokens of a row that fills the window.
    """
    rows = zip(rollout.sequences.tolist(), rollout.attention_mask.sum(1).tolist(), rollout.ended.tolist(), strict=True)
    closed = []
    for ids, length, ended in rows:
        ids = ids[:length]
        if ended and ids[-1] == end.stop:
            closed.append([*ids, *end.ids[end.num_generated :]][:window])
        else:
            ids = ids[:-1] if ended else ids
            closed.append([*ids[: None if window is None else window - len(end.ids)], *end.ids])
    return closed


def even_batches(lengths: list[int], max_tokens: int, joined: bool = False) -> list[list[int]]:
    """Returns `micro_batches`, the same number on every rank: a rank with fewer repeats its shortest row."""
    batches = micro_batches(lengths, max_tokens, world_size(), joined)
    most = max(gather_objects(len(batches)))
    shortest = min(range(len(lengths)), key=lengths.__getitem__)
    return batches + [[shortest]] * (most - len(batches))


def _by_batch(
    module: nn.Module, rollout: Rollout, config: PPOConfig, function: Callable[[Rollout], tuple[torch.Tensor, ...]]
) -> tuple[torch.Tensor, ...]:
    """Applies a function to micro-batches of a rollout, cut to their longest rows; returns [batch, length] results."""
    lengths = rollout.attention_mask.sum(1).tolist()
    results = None
    for rows in even_batches(lengths, config.micro_batch_tokens, module.joins_rows):
        longest = max(lengths[i] for i in rows)
        index = to_device(torch.tensor(rows), rollout.sequences.device)
        part = rollout.rows(index).map(lambda x, longest=longest: x[:, :longest] if x.dim() > 1 else x)
        outputs = function(part)
        if results is None:
            results = tuple(torch.zeros(rollout.sequences.shape, device=x.device) for x in outputs)
        for result, x in zip(results, outputs, strict=True):
            result[index, : x.shape[1]] = x.float()
    stop_signal.check()
    return results
