"""Scoring in chunks, micro-batches and joined rows equals a plain computation, in bounded memory.

The update is compared in tests/end_to_end/test_slow_paths.py.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import ppo.models
import tests.helpers.varlen
import utils.models.chunked_logprobs
import utils.models.padding_free
from ppo.models import PolicyModel
from ppo.score import score
from ppo.types import Rollout
from tests.helpers.parts import PROMPTS, ppo_config, prompts_of, rollout_by_hand, tiny_models, tiny_policy, token_ids
from utils.memory.activation_peak import LiveBytes
from utils.models.chunked_logprobs import logprobs_and_entropy, sum_nll


@pytest.fixture
def small_pieces(monkeypatch):
    """Logits of three tokens a chunk, two of them in float32 at once."""
    monkeypatch.setattr(ppo.models, "CHUNK_ELEMENTS", 3 * 24)
    monkeypatch.setitem(utils.models.chunked_logprobs.FLOATS, "cpu", 2 * 24)


@pytest.fixture(params=["padded", "joined", "varlen"])
def layout(request, monkeypatch):
    """Rows with their padding; end to end, an attention call each; end to end, in one call that knows their ends."""
    if request.param == "padded":
        monkeypatch.setattr(utils.models.padding_free, "FULL_ATTENTION", ())
    if request.param == "varlen":
        tests.helpers.varlen.on_cpu(monkeypatch)
    return request.param


def samples(batch: Rollout) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(row, ids [1, length], indices of its response tokens) one after the other, without padding."""
    for row, (ids, real, mask) in enumerate(
        zip(batch.sequences, batch.attention_mask, batch.response_mask, strict=True)
    ):
        yield row, ids[real][None], mask.nonzero().squeeze(1)


def plain_policy(lm: nn.Module, ids: torch.Tensor, places: torch.Tensor, temperature: float):
    """Log-probabilities and entropies of the tokens at `places` of one sequence, from all its logits."""
    every = torch.log_softmax(lm(ids).logits[0].float() / temperature, dim=-1)
    before = every[places - 1]
    return before[torch.arange(len(places)), ids[0, places]], -(before.exp() * before).sum(-1)


def plain_values(critic: nn.Module, ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    hidden = critic.backbone(input_ids=ids).last_hidden_state[0]
    return (hidden @ critic.head.weight[0])[places - 1]


@pytest.mark.parametrize(("temperature", "micro_batch_tokens"), [(1.0, 1000), (0.7, 20)])
def test_scoring_equals_one_sequence_at_a_time_with_all_logits(small_pieces, layout, temperature, micro_batch_tokens):
    models, rollout = tiny_models(), rollout_by_hand()
    assert models.policy.module.joins_rows is models.critic.module.joins_rows is (layout != "padded")
    config = ppo_config(micro_batch_tokens=micro_batch_tokens)
    scores = score(rollout, prompts_of(*PROMPTS), models, None, token_ids(), temperature, config)
    columns = scores.old_logprobs, scores.entropy, scores.ref_logprobs, scores.old_values
    for row, ids, places in samples(rollout):
        with torch.no_grad():
            logprobs, entropy = plain_policy(models.policy.module.lm, ids, places, temperature)
            ref_logprobs, _ = plain_policy(models.reference.model.lm, ids, places, temperature)
            values = plain_values(models.critic.module, ids, places)
        for column, plain in zip(columns, (logprobs, entropy, ref_logprobs, values), strict=True):
            assert float((column[row, places] - plain).norm()) <= 1e-6 * float(plain.norm())
    assert not any(column[~rollout.response_mask].any() for column in columns)


@pytest.mark.parametrize(("temperature", "weights"), [(1.0, (1.0, 0.0)), (0.7, (0.0, 1.0)), (0.7, (-2.0, 0.5))])
def test_gradients_of_logprobs_and_entropy(monkeypatch, temperature, weights):
    monkeypatch.setitem(utils.models.chunked_logprobs.FLOATS, "cpu", 2 * 24)
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(7, 24, generator=generator, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(24, (7,), generator=generator)
    by_token = torch.randn(7, generator=generator)

    def gradient(logprobs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        loss = sum(w * (by_token * x).sum() for w, x in zip(weights, (logprobs, entropy), strict=True) if w)
        return torch.autograd.grad(loss, logits)[0]

    every = torch.log_softmax(logits / temperature, -1)
    expected = gradient(every[torch.arange(7), targets], -(every.exp() * every).sum(-1))
    ours = gradient(*logprobs_and_entropy(logits, targets, temperature, with_entropy=True))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert logprobs_and_entropy(logits, targets, temperature)[1] is None


def peak(vocab: int, batch: int, loss: str) -> int:
    """Bytes of forward and backward of a bf16 policy so thin that logits are all that counts."""
    policy = PolicyModel(tiny_policy(vocab, num_hidden_layers=1, tie_word_embeddings=True).lm.bfloat16())
    sequences = torch.randint(3, vocab, (batch, 33), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(sequences).bool()
    mask[:, 0] = False
    with LiveBytes() as counter:
        if loss == "policy":
            logprobs, entropy = policy(sequences, mask)
            (logprobs.sum() + entropy.sum()).backward()
        else:
            hidden = policy.lm.get_decoder()(input_ids=sequences).last_hidden_state
            sum_nll(hidden, sequences, mask, policy.logits, chunk=(1 << 17) // vocab).backward()
    return counter.peak


@pytest.mark.parametrize("loss", ["policy", "nll"])
def test_logits_of_twice_the_batch_and_vocabulary_take_no_more_memory(monkeypatch, loss):
    monkeypatch.setattr(ppo.models, "CHUNK_ELEMENTS", 1 << 17)
    monkeypatch.setitem(utils.models.chunked_logprobs.FLOATS, "cpu", 1 << 14)
    more_logits = 2 * 32 * (32 * 4000 - 16 * 2000)  # bytes of bf16, were all held
    weights = 2 * 4000 * 32  # of the head, whose gradient is there twice while it adds up
    assert peak(4000, 32, loss) - peak(2000, 16, loss) < 0.25 * more_logits + 2 * weights
