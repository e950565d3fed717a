"""sft/: packed and unpacked rows have the same loss and gradient; the loss in chunks is a plain cross entropy."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, MistralConfig
from transformers.modeling_flash_attention_utils import _is_packed_sequence, prepare_fa_kwargs_from_position_ids

import tests.helpers.varlen
from data.dialogues import EncodedDialogue
from sft.config import SFTConfig
from sft.loss import answer_loss
from sft.model import AnswerModel, packing_failure
from sft.packed_batches import Layout, PackedRow
from sft.stage import load
from tests.helpers.tiny import tiny_llama, tiny_llama_config, tiny_llama_folder
from utils.models.chunked_logprobs import head_logits, sum_nll

LENGTHS = [23, 5, 12, 3, 9, 2, 17, 8, 4, 30]
PACKED, PLAIN = Layout(True, False, 64), Layout(False, False, 64)
FLASH = Layout(True, True, 64)


def dialogues(vocab: int = 400) -> list[EncodedDialogue]:
    """Random ids; two stretches of answers in the longer ones, everything after the first token in the shortest."""
    generator = torch.Generator().manual_seed(1)
    result = []
    for length in LENGTHS:
        ids = torch.randint(3, vocab, (length,), generator=generator).tolist()
        mask = [t > 0 and (t % 7 in (2, 3) or t >= length - 2) for t in range(length)]
        result.append(EncodedDialogue(ids, mask, f"file.json:{length}"))
    return result


def sizes_of(rows: list[PackedRow]) -> list[list[int]]:
    return [[len(dialogue.ids) for dialogue in row.dialogues] for row in rows]


def test_rows_are_as_long_as_the_longest_dialogue_and_ranks_get_as_many_tokens():
    rows = PACKED.rows(dialogues(), num_ranks=1)
    # 113 tokens in rows of 30: 30; 23 with 5 and 2; 17 with 12; 9 with 8, 4 and 3
    assert sizes_of(rows) == [[30], [23, 5, 2], [17, 12], [9, 8, 4, 3]]
    assert sum(row.answer_tokens for row in rows) == sum(sum(item.answer_mask) for item in dialogues())
    few = Layout(True, True, 8192).rows(dialogues(), num_ranks=3)
    assert [row.tokens for row in few] == [38, 38, 37]  # not one row of 113 and two ranks idle


def test_flash_attention_gets_one_row_without_padding():
    rows = FLASH.rows(dialogues(), num_ranks=1)
    ids, answers, positions = FLASH.collate(rows)
    assert ids.shape == answers.shape == positions.shape == (1, 113) and _is_packed_sequence(positions, 1)
    (starts, _), _ = prepare_fa_kwargs_from_position_ids(positions)
    assert starts.diff().tolist() == [size for row in sizes_of(rows) for size in row]
    assert PACKED.collate(PACKED.rows(dialogues()[:1] * 3, 1))[2] is None  # one dialogue per row


def tiny_model(name: str) -> AnswerModel:
    if name == "sdpa":
        return AnswerModel(tiny_llama(attn_implementation=name))
    configs = {
        "sliding window": lambda: MistralConfig(**tiny_llama_config().to_dict() | {"sliding_window": 6}),
        "learned positions": lambda: GPT2Config(vocab_size=400, n_positions=64, n_embd=32, n_layer=2, n_head=2),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AnswerModel(AutoModelForCausalLM.from_config(configs[name]()).eval())


def loss_and_gradient(model: AnswerModel, layout: Layout, rows_at_once: int) -> tuple[float, torch.Tensor]:
    rows = layout.rows(dialogues(), num_ranks=1)
    total = 0.0
    for start in range(0, len(rows), rows_at_once):
        loss = model(*layout.collate(rows[start : start + rows_at_once]))
        loss.backward()
        total += loss.item()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return total, gradient


@pytest.mark.parametrize("name", ["sdpa", "sliding window", "learned positions"])
def test_packed_and_unpacked_have_the_same_loss_and_gradient(name):
    model = tiny_model(name)
    assert packing_failure(model.lm, "M") is None
    loss, gradient = loss_and_gradient(model, PLAIN, rows_at_once=1)
    for layout, rows_at_once in ((PLAIN, 10), (PACKED, 4), (PACKED, 1), (FLASH, 2)):
        packed_loss, packed_gradient = loss_and_gradient(model, layout, rows_at_once)
        assert packed_loss == pytest.approx(loss, rel=1e-5)
        assert (packed_gradient - gradient).norm() < 1e-5 * gradient.norm()


def test_dialogues_in_joined_rows_have_the_same_loss_and_gradient(monkeypatch):
    model, loss = tiny_model("sdpa"), partial(loss_and_gradient, layout=PLAIN)
    alone, gradient = loss(model, rows_at_once=1)
    tests.helpers.varlen.on_cpu(monkeypatch)
    seen = []
    model.lm.model.embed_tokens.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    joined, joined_gradient = loss(model, rows_at_once=10)
    # The last token of a dialogue is a target, not an input.
    assert seen == [(1, sum(LENGTHS) - len(LENGTHS))]
    assert joined == pytest.approx(alone, rel=1e-5)
    assert (joined_gradient - gradient).norm() < 1e-5 * gradient.norm()


def test_where_rows_are_joined_dialogues_are_not_packed(tmp_path, monkeypatch):
    path = str(tiny_llama_folder(tmp_path, tokenizer=False))
    config = SFTConfig(hf_model_name_or_path=path, data_path=["D"], dtype="fp32", context_truncate=64)
    assert load(config, None, print)[1] == Layout(True, False, config.micro_batch_tokens, False)
    tests.helpers.varlen.on_cpu(monkeypatch)
    assert load(config, None, print)[1] == Layout(False, False, config.micro_batch_tokens, True)


def test_packed_dialogues_that_see_each_other_have_another_loss():
    """Shows that the test above can detect a leak in this model."""
    model = tiny_model("sdpa")
    rows = PACKED.rows(dialogues(), num_ranks=1)
    ids, answers, positions = PACKED.collate(rows)
    apart, leaking = model(ids, answers, positions).item(), model(ids, answers).item()
    assert abs(leaking - apart) > 1e-3 * apart


def test_a_mask_that_does_not_part_packed_dialogues_is_noticed(monkeypatch):
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda _: None)
    assert "standard deviations" in packing_failure(tiny_llama(), "M")


def case(batch: int = 3, length: int = 7, width: int = 8, vocab: int = 11):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch, length, width, generator=generator)
    sequences = torch.randint(0, vocab, (batch, length), generator=generator)
    mask = torch.rand(batch, length, generator=generator) < 0.5
    mask[:, 0] = False
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = nn.Linear(width, vocab, bias=False)
    return hidden, sequences, mask, head


@pytest.mark.parametrize("chunk", [1, 4, 100], ids=["made again", "kept", "one"])
def test_chunks_give_the_loss_and_gradient_of_a_plain_cross_entropy(chunk):
    hidden, sequences, mask, head = case()
    assert 4 < mask.sum() <= 16
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    (3 * sum_nll(ours, sequences, mask, head, chunk=chunk)).backward()
    our_weight_grad, head.weight.grad = head.weight.grad, None
    targets = torch.where(mask, sequences, -100)[:, 1:]
    expected = F.cross_entropy(head(theirs)[:, :-1].flatten(0, 1), targets.flatten(), reduction="sum")
    (3 * expected).backward()
    assert sum_nll(hidden, sequences, mask, head, chunk=chunk).item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(our_weight_grad, head.weight.grad)


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_a_head_that_ranks_share_is_called_equally_often(tokens):
    """Under ZeRO-3, ranks with different numbers of calls would deadlock: up to 2500 tokens are always three chunks."""
    hidden, sequences, _, head = case(batch=1, length=8)
    mask = (torch.arange(8) >= 8 - tokens)[None]
    calls = []
    head.register_forward_hook(lambda *_: calls.append(1))
    alone = answer_loss(hidden, sequences, mask, head)
    assert len(calls) == 1
    torch.testing.assert_close(answer_loss(hidden, sequences, mask, head, even_tokens=2500), alone)
    assert len(calls) == 1 + 3
    assert alone.item() > 0 or not tokens
    assert sum_nll(hidden.bfloat16(), sequences, mask, head.bfloat16()).dtype == torch.float32


def test_soft_capped_logits_stay_within_the_cap():
    logits = partial(head_logits, nn.Identity(), SimpleNamespace(final_logit_softcapping=30.0))
    assert logits(torch.tensor([30.0])).item() == pytest.approx(30 * math.tanh(1.0), rel=1e-6)
