"""Rows that are joined for a forward: the states of each alone, in every architecture that may, and in no other."""

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AutoModel, GPT2Config, MistralConfig, Qwen2Config

import tests.helpers.varlen
import utils.models.padding_free
from tests.helpers.tiny import LLAMA_KIND, SIZES
from utils.models.padding_free import joins_rows, states_of

LENGTHS = [9, 1, 30, 4]
APART = {
    "sliding window": MistralConfig(**SIZES | {"sliding_window": 6}),
    "some layers with one": Qwen2Config(
        **SIZES | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    ),
    "not in the list": GPT2Config(vocab_size=400, n_positions=64, n_embd=32, n_layer=2, n_head=2),
}


def decoder_of(config, attention: str = "sdpa"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModel.from_config(config, attn_implementation=attention).eval()


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 400, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    return ids, torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


@pytest.mark.parametrize(("name", "kernel"), [*((name, "sdpa") for name in LLAMA_KIND), ("qwen2", "varlen")])
def test_joined_rows_have_the_states_and_gradients_of_each_alone(monkeypatch, name, kernel):
    if kernel == "varlen":
        tests.helpers.varlen.on_cpu(monkeypatch)
    assert set(LLAMA_KIND) == set(utils.models.padding_free.FULL_ATTENTION)
    decoder, (ids, real) = decoder_of(LLAMA_KIND[name]), rows()
    decoder.gradient_checkpointing_enable({"use_reentrant": False})
    decoder.train()
    assert joins_rows(decoder)
    seen = []
    decoder.embed_tokens.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    states = states_of(decoder, ids, real)
    states.square().sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in decoder.parameters()])
    assert seen == [(1, sum(LENGTHS))]
    decoder.zero_grad()
    alone = torch.cat([decoder(input_ids=row[:n][None]).last_hidden_state[0] for row, n in zip(ids, LENGTHS)])
    alone.square().sum().backward()
    torch.testing.assert_close(states, alone, atol=1e-5, rtol=1e-5)
    plain = torch.cat([p.grad.flatten() for p in decoder.parameters()])
    assert (gradient - plain).norm() < 1e-5 * plain.norm()


def test_only_what_is_read_and_what_comes_before_it_is_run():
    decoder, (ids, real) = decoder_of(LLAMA_KIND["llama"]), rows()
    read = torch.zeros_like(real)
    read[0, 2] = read[2, 5] = read[2, 7] = True  # 3 and 8 tokens, and one of each row without any
    expected, seen = decoder(input_ids=ids).last_hidden_state[read], []
    decoder.embed_tokens.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    decoder.rotary_emb.register_forward_pre_hook(lambda module, args: seen.append(args[1].tolist()))
    torch.testing.assert_close(states_of(decoder, ids, read), expected, atol=1e-5, rtol=1e-5)
    assert seen == [(1, 3 + 1 + 8 + 1), [[0, 1, 2, 0, *range(8), 0]]]


@pytest.mark.parametrize("name", APART)
def test_others_run_padded(name):
    decoder, (ids, real) = decoder_of(APART[name]), rows()
    assert not joins_rows(decoder)
    torch.testing.assert_close(states_of(decoder, ids, real), decoder(ids).last_hidden_state[real])


def test_short_rows_of_bf16_are_attended_in_float32():
    """The output is rounded once, at the end."""
    generator = torch.Generator().manual_seed(0)
    lengths, heads, size = [40, 7], 2, 16
    states = torch.randn(3, 1, heads, sum(lengths), size, generator=generator).bfloat16()
    mask = torch.tensor(lengths).view(1, 1, 1, -1)
    attend = AttentionInterface()[utils.models.padding_free.SDPA_JOINED]
    found, _ = attend(nn.Module(), *states, mask, is_causal=True)
    assert found.dtype == torch.bfloat16
    for row, part in zip(found[0].split(lengths), states.double().split(lengths, dim=3), strict=True):
        query, key, value = part[:, 0]
        scores = (query @ key.mT / size**0.5).masked_fill(torch.ones(2 * [len(row)]).triu(1).bool(), -torch.inf)
        expected = (scores.softmax(-1) @ value).transpose(0, 1).bfloat16()
        assert float((row != expected).float().mean()) < 0.01
