"""What the four models say of finished responses: log-probabilities, values, scores. No gradients."""

import copy
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable

import torch
from torch import nn

from data.batching.collate import micro_batches
from data.chat import TurnEnd, turn_end
from data.template import Turns, decode_answer
from ppo.config import PPOConfig
from ppo.models import Models
from ppo.rollout import response_ids
from ppo.types import MeasuredRollout, PromptBatch, Rollout, Scores
from reward.scoring.ensemble import Ensemble, score_ids
from utils.distributed import any_rank, gather_objects, world_size
from utils.engine.state import same_weights
from utils.errors import UserError
from utils.tensors import before, shift_to_next, to_device
from utils.tokenizer import template_of

RewardFunction = Callable[[list[list[dict]], list[str]], list[float]]


@torch.no_grad()
def score(
    rollout: Rollout, prompts: PromptBatch, models: Models, reward_fn: RewardFunction | None,
    tokenizer, temperature: float, config: PPOConfig,
) -> Scores:  # fmt: skip
    """Forwards of at most micro_batch_tokens tokens each; logits at response tokens only.

    Log-probabilities of policy and reference are taken at the temperature that was sampled at. Every rank does the
    same number of forwards. Memory: one micro-batch's activations, whatever the buffer. Where the sampler has measured
    its tokens, the policy makes no forward; the reference makes none while it and the policy are the same.
    """
    models.policy.module.eval()
    lengths = rollout.attention_mask.sum(1).tolist()

    def by_batch(module: nn.Module, function: Callable[[Rollout], tuple[torch.Tensor, ...]]):
        batches = even_batches(lengths, config.micro_batch_tokens, module.joins_rows)
        return _by_batch(rollout, lengths, batches, function)

    def of_policy(part: Rollout) -> tuple[torch.Tensor, ...]:
        return models.policy(part.sequences, part.response_mask, temperature)

    if isinstance(rollout, MeasuredRollout):
        logprobs, entropy = rollout.old_logprobs, rollout.entropy
    else:
        logprobs, entropy = by_batch(models.policy.module, of_policy)
    with models.reference.resident() as reference:

        def of_reference(part: Rollout) -> tuple[torch.Tensor]:
            return reference(part.sequences, part.response_mask, temperature, with_entropy=False)[:1]

        # Asked each time: a policy that is known not to have moved is not the same after a resume or a rollback.
        moved = not same_weights(models.policy.module, reference)
        ref_logprobs = logprobs
        if any_rank(moved, logprobs.device):
            (ref_logprobs,) = by_batch(reference, of_reference)

    def token_values(part: Rollout) -> tuple[torch.Tensor]:
        return (shift_to_next(models.critic(part.sequences, before(part.response_mask))),)

    values = torch.zeros_like(logprobs)
    if models.critic is not None:
        models.critic.module.eval()
        (values,) = by_batch(models.critic.module, token_values)
    members, truncated = reward_scores(rollout, prompts, models.reward, tokenizer, config.micro_batch_tokens)
    scores = torch.zeros(len(rollout), device=rollout.sequences.device)
    if models.reward is not None:
        scores = models.reward.combine(members)
    if reward_fn is not None:
        answers = [decode_answer(tokenizer, ids) for ids in response_ids(rollout)]
        scores = scores + torch.tensor(call_reward_fn(reward_fn, prompts.turns, answers), device=scores.device)
    return Scores(logprobs, ref_logprobs, entropy, values, scores, members, truncated)


def reward_scores(
    rollout: Rollout, prompts: PromptBatch, reward: Ensemble | None, tokenizer, max_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`member_scores` and `truncated` of `Scores`: each reward model's raw scores, one model after the other.

    Those that read the policy's ids get them as sampled; for the others the answers are decoded and encoded anew behind
    their prompt's turns. Every rank does the same number of forwards either way.
    """
    scores = truncated = torch.zeros(len(rollout), 0, device=rollout.sequences.device)
    members = reward.members if reward else []
    texts = dialogues(rollout, prompts, tokenizer) if any(member.encoding for member in members) else []
    for member in members:
        if member.encoding is None:
            ids = closed_ids(rollout, turn_end(tokenizer, template_of(tokenizer)), member.window)
        else:
            ids, cut = zip(*map(member.encoding, texts), strict=True)
            truncated = torch.cat([truncated, torch.tensor(cut, device=truncated.device)[:, None]], 1)
        with member.model.resident() as model:
            batches = even_batches([len(row) for row in ids], max_tokens, model.joins_rows)
            scores = torch.cat([scores, score_ids(model, ids, batches)[:, None]], 1)
    return scores, truncated.bool()


def dialogues(rollout: Rollout, prompts: PromptBatch, tokenizer) -> list[Turns]:
    """The texts of the rollout: each prompt's turns and the answer."""
    answers = [decode_answer(tokenizer, ids) for ids in response_ids(rollout)]
    return [[*turns, {"role": "assistant", "content": a}] for turns, a in zip(prompts.turns, answers, strict=True)]


def closed_ids(rollout: Rollout, end: TurnEnd, window: int | None = None) -> list[list[int]]:
    """Prompt and response of each row, ended as the template ends a turn.

    For the reward model only: it was trained on whole answers, and its score at any other token says nothing. What a
    missing end shall cost is --missing_eos_penalty's to say. A response that another stop id has ended gets the
    template's end in its place. Where the row fills the window, the end takes the place of its last tokens.
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
    """`micro_batches`, as many on every rank: a rank with fewer scores its shortest row again."""
    batches = micro_batches(lengths, max_tokens, world_size(), joined)
    most = max(gather_objects(len(batches)))
    shortest = min(range(len(lengths)), key=lengths.__getitem__)
    return batches + [[shortest]] * (most - len(batches))


def _by_batch(
    rollout: Rollout, lengths: list[int], batches: list[list[int]],
    function: Callable[[Rollout], tuple[torch.Tensor, ...]],
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Runs a function of a rollout over micro-batches, cut to their longest row, and puts the results back in place."""
    results = None
    for rows in batches:
        longest = max(lengths[i] for i in rows)
        index = to_device(torch.tensor(rows), rollout.sequences.device)
        part = rollout.rows(index).map(lambda x, longest=longest: x[:, :longest] if x.dim() > 1 else x)
        outputs = function(part)
        if results is None:
            shapes = [rollout.sequences.shape if x.dim() > 1 else rollout.sequences.shape[:1] for x in outputs]
            results = tuple(torch.zeros(shape, device=x.device) for shape, x in zip(shapes, outputs, strict=True))
        for result, x in zip(results, outputs, strict=True):
            if x.dim() > 1:
                result[index, : x.shape[1]] = x.float()
            else:
                result[index] = x.float()
    return results


def load_reward_fn(spec: str) -> RewardFunction:
    """The function in `file.py:name`. This runs that file: it is the one place where a user's code is executed."""
    path, _, name = spec.rpartition(":")
    if not path or not os.path.isfile(path):
        raise UserError(f"--reward_fn {spec}: give an existing file and a function, as in my_scores.py:length")
    module_spec = importlib.util.spec_from_file_location("reward_fn", path)
    if module_spec is None:
        raise UserError(f"--reward_fn {spec}: {path} is not a Python file; its name has to end in .py")
    module = importlib.util.module_from_spec(module_spec)
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # nothing of ours beside the user's file
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever that file may do wrong
        raise UserError(f"--reward_fn {spec} cannot be loaded: {_failure(error)}") from error
    finally:
        sys.dont_write_bytecode = writes
    if not callable(getattr(module, name, None)):
        raise UserError(f"--reward_fn {spec}: {path} has no function {name}; give the name of one")
    return getattr(module, name)


def call_reward_fn(reward_fn: RewardFunction, prompts: list[list[dict]], answers: list[str]) -> list[float]:
    """One number an answer, or a UserError that says what came instead. prompts: the turns of each dialogue.

    The function gets copies: what it does with a dialogue, the answer appended, say, is its own affair.
    """
    try:
        scores = reward_fn(copy.deepcopy(prompts), list(answers))
    except (Exception, SystemExit) as error:  # whatever the user's function may do wrong
        raise UserError(f"--reward_fn failed: {_failure(error)}") from error
    try:
        scores = [float(score) for score in scores]
    except (TypeError, ValueError):
        raise UserError("--reward_fn must return a list of numbers, one an answer") from None
    if len(scores) != len(answers):
        raise UserError(f"--reward_fn returned {len(scores)} numbers for {len(answers)} answers")
    return scores


def _failure(error: Exception) -> str:
    """ "file.py:12: KeyError: 'x'; mend it": where in the user's code an error came from, on one line."""
    last = error if isinstance(error, SyntaxError) else traceback.extract_tb(error.__traceback__)[-1]
    reason = " ".join(traceback.format_exception_only(error)[-1].split())
    return f"{last.filename}:{last.lineno}: {reason}; mend it"
