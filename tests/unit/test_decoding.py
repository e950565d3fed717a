"""Continuous decoding against a plain decode: one prompt at a time, no cache, tokens drawn by hand."""

import gc
import itertools
import math
import os
import signal
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, MistralConfig, Qwen2Config, Qwen3Config

from ppo.decoding import attention as grouped_attention
from ppo.decoding.attention import grouped
from ppo.decoding.kv_cache import _SlotLayer
from ppo.decoding.sampling import EVALUATION, Sampling, uniforms
from ppo.decoding.scheduler import Decoder, DecodingOptions
from ppo.models import PolicyModel
from ppo.rollout import decoding_options
from tests.helpers.parts import EOS, VOCAB_SIZE, ppo_config, tiny_policy, token_ids
from tests.helpers.tiny import SIZES, tiny_llama_config
from utils.run.stop_signal import Stop

GENERATOR = torch.Generator().manual_seed(0)
LENGTHS = [3, 30, 1, 7, 7, 19, 12, 2, 26, 5, 9, 14, 40]
PROMPTS = [torch.randint(0, VOCAB_SIZE, (length,), generator=GENERATOR).tolist() for length in LENGTHS]
LIMITS = [24, 3, 40, 1, 24, 9, 24, 33, 24, 2, 24, 16, 24]
PLACES = list(range(100, 113))
CPU = torch.device("cpu")
YARN = {"rope_type": "yarn", "factor": 3.0, "rope_theta": 10000.0}
GREEDY = Sampling(temperature=0.01)  # the likeliest token is hundreds of nats above the next
ROOMS = [
    DecodingOptions(4, 64),
    DecodingOptions(1, 1000),
    DecodingOptions(64, 1000),
    DecodingOptions(8, 10, steps_per_check=3),
    DecodingOptions(16, 100, cache_tokens=200),
    DecodingOptions(8, 10, llama_step=True),
    DecodingOptions(8, 10, steps_per_check=3, llama_step=True),
]
CASES = [*((options, EVALUATION) for options in ROOMS), (ROOMS[0], Sampling()), (ROOMS[5], GREEDY)]


def draw_by_hand(logits: torch.Tensor, sampling: Sampling, seen: list[int], uniform: float) -> int:
    """Penalty, temperature, the fewest likeliest tokens that reach topp, and the first whose sum exceeds `uniform`."""
    scores = logits.tolist()
    for token in set(seen):
        scores[token] *= sampling.repetition_penalty ** (1 if scores[token] < 0 else -1)
    weights = [math.exp((score - max(scores)) / sampling.temperature) for score in scores]
    probs = [weight / sum(weights) for weight in weights]
    likeliest = sorted(range(len(probs)), key=lambda i: -probs[i])
    reached = list(itertools.accumulate(probs[i] for i in likeliest))
    nucleus = {i for i, total in zip(likeliest, reached) if total - probs[i] < sampling.topp}
    target, total = uniform * sum(probs[i] for i in nucleus), 0.0
    for i in sorted(nucleus):
        total += probs[i]
        if total > target:
            return i
    raise AssertionError(total)


@torch.no_grad()
def plain_decode(policy: PolicyModel, sampling: Sampling, seed: int, eos: int = EOS) -> list[list[int]]:
    responses = []
    for prompt, place, limit in zip(PROMPTS, PLACES, LIMITS):
        ids = list(prompt)
        while len(ids) - len(prompt) < limit and (len(ids) == len(prompt) or ids[-1] != eos):
            logits = policy.lm(torch.tensor([ids]), use_cache=False).logits[0, -1]
            uniform = uniforms(seed, torch.tensor([place]), len(ids) - len(prompt)).item()
            ids.append(draw_by_hand(logits, sampling, ids[len(prompt) :], uniform))
        responses.append(ids[len(prompt) :])
    return responses


def decode(policy: PolicyModel, sampling: Sampling, seed: int, options: DecodingOptions) -> list[list[int]]:
    with grouped(policy.lm.config):
        tokens = Decoder(policy, PROMPTS, PLACES, LIMITS, sampling, seed, token_ids(), options, CPU).run()
    return [row.tolist() for row in tokens]


@pytest.mark.parametrize(("options", "sampling"), CASES, ids=str)
def test_equals_a_plain_decode(options, sampling):
    policy = tiny_policy(max_position_embeddings=256)
    expected = plain_decode(policy, sampling, seed=7)
    assert decode(policy, sampling, 7, options) == expected
    ends = [row[-1] == EOS for row in expected]
    assert sampling == GREEDY or (any(ends) and not all(ends))  # both kinds of end have been seen


def test_any_stop_id_ends_a_response():
    policy, tokenizer, stops = tiny_policy(max_position_embeddings=256), token_ids(), (EOS, 5, 11)
    work, options = (policy, PROMPTS, PLACES, LIMITS, Sampling(), 7), DecodingOptions(4, 64)
    whole = Decoder(*work, token_ids(eos=-1), options, CPU).run()
    tokenizer.stop_ids = stops
    found = Decoder(*work, tokenizer, options, CPU).run()
    for row, expected in zip(found, whole):
        ends = [t for t, token in enumerate(expected.tolist()) if token in stops]
        assert row.tolist() == expected[: ends[0] + 1 if ends else None].tolist()
    assert {int(row[-1]) for row in found} > set(stops)  # each ended some, the limit others


def test_decoding_ends_soon_after_a_signal(monkeypatch):
    """Each answer is the beginning of what it would have been."""
    options, policy, forwards = DecodingOptions(4, 64, steps_per_check=3), tiny_policy(), itertools.count(1)

    def watch(_) -> None:
        if next(forwards) == 20:
            os.kill(os.getpid(), signal.SIGTERM)

    with Stop(0.0) as stop, grouped(policy.lm.config):
        monkeypatch.setattr(Stop, "current", stop)
        found = Decoder(policy, PROMPTS, PLACES, LIMITS, EVALUATION, 0, token_ids(), options, CPU, watch=watch).run()
    assert 20 < next(forwards) <= 23
    monkeypatch.undo()
    whole = decode(policy, EVALUATION, 0, options)
    assert 0 < sum(map(len, found)) < sum(map(len, whole))
    assert all(row.tolist() == other[: len(row)] for row, other in zip(found, whole, strict=True))


def test_the_cache_is_gone_when_decoding_ends(monkeypatch):
    """Not when Python next looks for cycles: a GPU would have to hold two."""
    layers, policy = [], tiny_policy(max_position_embeddings=256)
    allocate = _SlotLayer.lazy_initialization

    def remember(self, *states):
        allocate(self, *states)
        layers.extend([weakref.ref(self), weakref.ref(self.keys)])

    monkeypatch.setattr(_SlotLayer, "lazy_initialization", remember)
    gc.disable()
    try:
        decode(policy, Sampling(), 7, DecodingOptions(4, 64))
        assert layers and not any(layer() is not None for layer in layers)
    finally:
        gc.enable()


SMALL = {"vocab_size": VOCAB_SIZE, "hidden_size": 32}
OTHERS = {  # name -> (config, whether our own step runs it)
    "ALiBi": (BloomConfig(**SMALL, n_layer=2, n_head=4), False),
    "learned positions": (GPT2Config(vocab_size=VOCAB_SIZE, n_positions=128, n_embd=32, n_layer=2, n_head=2), False),
    "window, shared heads": (MistralConfig(**SIZES | SMALL | {"sliding_window": 6}), False),
    "biases": (Qwen2Config(**SIZES | SMALL), True),
    "more biases, stretched positions": (
        tiny_llama_config(**SMALL, attention_bias=True, mlp_bias=True, rope_parameters=YARN), True,
    ),
    "norms of heads of another size": (Qwen3Config(**SIZES | SMALL | {"head_dim": 12}), True),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_positions_and_attention(name):
    config, llama_step = OTHERS[name]
    torch.manual_seed(1)
    policy = PolicyModel(AutoModelForCausalLM.from_config(config).eval())
    for parameter in policy.parameters():  # far from uniform, so that a wrong position shows; biases that are not 0
        parameter.data.mul_(4.0).add_(0.2 * torch.randn_like(parameter))
    assert decoding_options(ppo_config(), policy).llama_step is llama_step
    assert not decoding_options(ppo_config(), policy, True).llama_step  # weights are split over ranks
    before, forwards = policy.lm.config._attn_implementation, []
    policy.decoder.register_forward_pre_hook(lambda *_: forwards.append(1))
    options = DecodingOptions(64, 1000, llama_step=llama_step)
    found = decode(policy, Sampling(), 3, options)
    assert (len(forwards) == 1) is llama_step  # over the prompts
    assert found == plain_decode(policy, Sampling(), 3)
    assert policy.lm.config._attn_implementation == before


@pytest.fixture
def counted():
    """(policy, shapes of the ids of its forwards so far)."""
    policy, shapes = tiny_policy(max_position_embeddings=256), []

    def count(module, inputs):
        shapes.append((len(inputs[0]), inputs[0][0].numel()))

    policy.lm.get_input_embeddings().register_forward_pre_hook(count)
    return policy, shapes


def decode_limited(policy: PolicyModel, prompts, places, limits, slots: int) -> list[list[int]]:
    options = DecodingOptions(slots, 1000, llama_step=True)
    with grouped(policy.lm.config):
        tokens = Decoder(policy, prompts, places, limits, Sampling(), 1, token_ids(eos=-1), options, CPU).run()
    return [row.tolist() for row in tokens]


def test_equal_prompts_share_a_forward(counted):
    policy, shapes = counted
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0]] * 2
    together = decode_limited(policy, prompts, PLACES[:8], [5] * 8, 8)
    assert shapes == [(2, 30)] + [(8, 1)] * 4
    alone = [decode_limited(policy, [ids], [place], [5], 1)[0] for ids, place in zip(prompts, PLACES)]
    assert together == alone
    assert len(set(map(tuple, together))) == 8


def test_slots_are_refilled_and_the_batch_shrinks(counted):
    policy, shapes = counted
    decode_limited(policy, [[1], [1, 3], [1, 4]], [0, 1, 2], [2, 6, 3], 2)
    # Those of 6 and 3 tokens start; the one of 2 takes the slot of the 3; then the 6 go on alone.
    assert shapes == [(2, 2), (2, 1), (2, 1), (1, 1), (2, 1), (1, 1), (1, 1)]


def test_shared_heads_are_read_once_per_token(monkeypatch):
    """While decoding, attention gets the two key-value heads of the cache, not one for each of the four heads."""
    seen, sdpa = [], grouped_attention.scaled_dot_product_attention

    def spy(query, key, value, *args, **kwargs):
        seen.append((tuple(query.shape[1:3]), key.shape[1]))
        return sdpa(query, key, value, *args, **kwargs)

    monkeypatch.setattr(grouped_attention, "scaled_dot_product_attention", spy)
    decode(tiny_policy(max_position_embeddings=256), Sampling(), 0, DecodingOptions(4, 64, llama_step=True))
    assert set(seen) == {((2, 2), 2)}
