"""Which way of decoding samples from the distribution that scoring sees: tried before a run begins."""

import copy
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from torch import nn

from ppo.grouped_attention import is_replaced
from ppo.new_token import goes_straight
from ppo.rollout import DECODING, generate
from ppo.sampling import Sampling
from ppo.types import PromptBatch
from utils.engine import InferenceEngine
from utils.errors import UserError
from utils.probe import Probe, distance

PROMPTS = (19, 16, 7, 3)  # tokens
STEPS = 8
DRAWS = 16  # forwards of a model that draws


def fastest_decoding(policy: nn.Module, config, what: str, say: Callable[[str], None]) -> str:
    """The first of DECODING by which the policy samples from its own distribution. It is left to decode that way.

    Raises UserError, which calls the model `what`, where none does: with a cache that is made of keys and values alone,
    as here, states of other kinds are lost from token to token. config: the run's flags. Every rank does the same.
    """
    probe = Probe(policy.lm, what)
    settings = policy.decoder.config
    applies = {"straight": goes_straight(settings), "grouped": is_replaced(settings), "own": True}
    for policy.decoding in [way for way in DECODING if applies[way]]:
        failure = probe.deviation(lambda: _distance(policy, probe, config))
        if failure is None:
            return policy.decoding
        if policy.decoding != DECODING[-1]:
            say(f"{what}: {policy.decoding} decoding is left out: with {probe.kind} it fails ({failure})")
    raise UserError(
        f"{what}: {probe.kind} cannot be decoded with a cache of keys and values ({failure}): SFT works with it, PPO "
        "does not; give another model"
    )


def check_training_mode(policy: nn.Module, what: str) -> None:
    """Raises UserError where the policy gives other numbers while it is trained, and ratios would not begin at 1.

    Dropout is off, but some routers draw among experts that are nearly as good: where anything is drawn, one forward
    alone may happen to draw the best. The global random state stays as it is.
    """
    probe = Probe(policy.lm, what)
    place = probe.rows[0].device
    random_state = partial(torch.cuda.get_rng_state, place) if place.type == "cuda" else torch.get_rng_state
    with torch.random.fork_rng([place] if place.type == "cuda" else []):
        before = random_state()
        policy.train()
        failure = probe.deviation(probe.together)
        draws = 0 if torch.equal(random_state(), before) else DRAWS
        failure = failure or next(filter(None, (probe.deviation(probe.together) for _ in range(draws))), None)
        policy.eval()
    if failure:
        raise UserError(f"{what}: {probe.kind} gives other numbers while it is trained ({failure}); give another model")


def _distance(policy: nn.Module, probe: Probe, config) -> float:
    """How far the logits that tokens are sampled from are from the model's own for the same tokens."""
    flags = copy.copy(config)
    flags.rollout_batch_size, flags.rollout_cache_tokens, flags.micro_batch_tokens = len(PROMPTS), 0, 1024
    flags.maxlen_res = STEPS
    ids = torch.cat(probe.rows).tolist()
    prompts = [ids[-length:] for length in PROMPTS]
    batch = PromptBatch(prompts, [[] for _ in prompts], list(range(len(prompts))))
    no_end = SimpleNamespace(eos_token_id=-1, pad_token_id=0)
    seen: list[torch.Tensor] = []  # [prompts, vocabulary] of each forward: longest prompt first, and none ends before
    hook = policy.register_forward_hook(lambda module, args, logits: seen.append(logits))
    try:
        rollout = generate(InferenceEngine(policy), batch, Sampling(), 0, no_end, flags)
    finally:
        hook.remove()
    rows = [row[real] for row, real in zip(rollout.sequences, rollout.attention_mask, strict=True)]
    true = [probe.alone(row)[length - 1 : -1] for row, length in zip(rows, PROMPTS, strict=True)]
    return distance(torch.stack(seen[:STEPS], 1), true)
