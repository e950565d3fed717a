"""Scores of dialogues by one or several reward models: batches, windows, rules, offloading, ranks, labels."""

import json
import math
from pathlib import Path

import pytest
import torch

from data.formats.dialogue_forms import parse_turns
from data.template import encode_dialogue
from reward.scoring import score_records
from reward.scoring.ensemble import Encoding, Ensemble, Frozen, Member, check_labels
from reward.scoring.score_records import score_chunk
from tests.helpers.parts import ppo_config, tiny_scalar_model
from tests.helpers.tiny import VOCAB, tiny_tokenizer_folder
from utils.engine.engine import device
from utils.engine.memory import host_copies
from utils.engine.split import shard_frozen
from utils.errors import UserError
from utils.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(str(tiny_tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))), "moss_en")


def test_the_oldest_turns_go_until_the_dialogue_fits_the_window(tokenizer):
    turns = parse_turns(["one two three", "four", "five six", "seven", "eight", "nine"])
    whole, _ = encode_dialogue(tokenizer, turns, "moss_en")
    without_first, _ = encode_dialogue(tokenizer, turns[2:], "moss_en")
    last_only, _ = encode_dialogue(tokenizer, turns[4:], "moss_en")
    for window, expected, cut in [
        (None, whole, False),
        (len(whole), whole, False),
        (len(whole) - 1, without_first, True),
        (len(without_first) - 1, last_only, True),
        (len(last_only) - 1, last_only[:1] + last_only[2:], True),  # the BOS stays, and so does the whole answer
    ]:
        assert Encoding(tokenizer, "moss_en", window)(turns) == (expected, cut), window


SCORES = torch.tensor([[1.0, 3.0, 8.0], [-2.0, -2.0, -2.0]])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("mean", [4.0, -2.0]), ("min", [1.0, -2.0]), ("mean_minus_std", [4.0 - 0.5 * math.sqrt((9 + 1 + 16) / 3), -2.0])],
)
def test_rules_by_hand(rule, expected):
    ensemble = Ensemble([], rule, std_coef=0.5)
    assert ensemble.combine(SCORES).tolist() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(ensemble.combine(SCORES[:, :1]), SCORES[:, 0])


def test_a_model_that_waits_in_host_memory_is_copied_one_way():
    """An offloaded model against a copy that is not: device, values and scores, over two uses."""
    place = device()
    model, twin = (tiny_scalar_model(vocab=VOCAB).requires_grad_(False).to(place) for _ in range(2))
    waiting = Frozen(model, offload=True)
    held = [parameter.data_ptr() for parameter in model.parameters()]
    ids = torch.arange(3, 23, device=place)[None]
    expected = twin(ids, torch.ones_like(ids).bool())
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), waiting.resident() as found:
            assert {x.device for x in (*found.parameters(), *found.buffers())} == {place}
            assert torch.equal(found(ids, torch.ones_like(ids).bool()), expected)
            1 / 0  # noqa: B018 - a failure does not leave the model on the device
        assert [parameter.data_ptr() for parameter in model.parameters()] == held
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert parameter.device.type == "cpu" and parameter.is_pinned() == (place.type == "cuda")
            assert torch.equal(parameter, other.cpu())


@pytest.mark.gpu
def test_a_model_that_waits_leaves_the_gpu_free():
    before = torch.cuda.memory_allocated()
    waiting = Frozen(tiny_scalar_model(vocab=VOCAB).requires_grad_(False).cuda(), offload=True)
    kept = torch.cuda.memory_allocated()
    with waiting.resident() as model:
        assert torch.cuda.memory_allocated() >= kept + sum(p.nbytes for p in model.parameters())
    assert torch.cuda.memory_allocated() == kept < before + 4096


@pytest.mark.gpu
def test_shards_wait_in_page_locked_memory(single_process):
    """As with several ranks, where a rank's shards are parts of the model."""
    whole = tiny_scalar_model(vocab=VOCAB).cuda()
    split = shard_frozen(tiny_scalar_model(vocab=VOCAB).cuda(), ppo_config(zero_stage=3), offload=True)
    assert all(parameter.ds_tensor.is_pinned() for parameter in split.parameters())
    ids = torch.arange(3, 23, device="cuda")[None]
    for _ in range(3):
        with torch.no_grad():
            scores = [model(ids, torch.ones_like(ids).bool()) for model in (split, whole)]
        torch.testing.assert_close(*scores)


def test_copies_share_buffers_and_keep_dtype_and_shape(monkeypatch):
    monkeypatch.setattr("utils.engine.memory.BUFFER", 1024)
    tensors = [torch.randn(50), torch.randn(3, 7).bfloat16(), torch.randn(1000), torch.tensor(3.0), torch.randn(0, 4)]
    tensors += [torch.randn(8, 2).t()]
    copies = host_copies(tensors)
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(copy, tensor) and copy.dtype == tensor.dtype
        assert tensor.numel() == 0 or copy.data_ptr() != tensor.data_ptr()
    # 200 bytes and 42 in 256 each, then 4000 by themselves, then two of 256 and an empty one.
    assert [copy.untyped_storage().nbytes() for copy in copies] == [1024, 1024, 4096, 512, 512, 512]


def reward_folder(folder: Path, **config) -> str:
    folder.mkdir()
    torch.save({"score.weight": torch.zeros(1, 2)}, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    return str(folder)


def test_labels_with_one_and_with_two_meanings(tmp_path):
    first = reward_folder(tmp_path / "a")
    check_labels([first, reward_folder(tmp_path / "same", id2label={"0": "LABEL_0"}, problem_type="regression")], "--m")
    other = reward_folder(tmp_path / "b", problem_type="single_label_classification")
    with pytest.raises(UserError, match=rf"^--m: the scores of {other} mean .*, .*/a LABEL_0 "):
        check_labels([first, other], "--m")


@pytest.mark.parametrize("count", [1, 5])
def test_ranks_share_a_chunk(tokenizer, monkeypatch, count):
    texts, shares = ["one", "two three", "four", "five and six", "a text longer than eight tokens"][:count], []
    members = []
    for seed, window in ((1, None), (2, 8)):
        model = tiny_scalar_model(VOCAB, seed).requires_grad_(False)
        members.append(Member(Frozen(model, False), window, Encoding(tokenizer, "moss_en", window)))
    expected = score_chunk(members, texts, 100)
    assert [(len(scores), cut) for scores, cut in expected] == [(2, k == 4) for k in range(count)]
    both = [[None] * count] * 2
    monkeypatch.setattr(score_records, "world_size", lambda: 2)
    monkeypatch.setattr(score_records, "gather_objects", lambda rows: shares.append(rows) or both)
    for rank in (0, 1):
        monkeypatch.setattr(score_records, "rank", lambda rank=rank: rank)
        score_chunk(members, texts, 100)
    assert [len(share) for share in shares] == [(count + 1) // 2, count // 2]
    monkeypatch.setattr(score_records, "gather_objects", lambda rows: shares)
    found = score_chunk(members, texts, 100)
    assert found == [(pytest.approx(scores, abs=1e-5), cut) for scores, cut in expected]
