"""reward/model.py: loading of the three layouts, saving, and refused models."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import utils.models.padding_free
from reward.model import (
    last_scores,
    load_scalar_model,
    new_head_weight,
    save_scalar_model,
    set_dropout,
    with_distinct_pad,
)
from tests.helpers.tiny import VOCAB, tiny_llama, tiny_llama_config, tiny_llama_folder
from utils.errors import UserError
from utils.models.load import load_causal_lm
from utils.tokenizer import load_tokenizer

CPU = torch.device("cpu")
FP32 = torch.float32


def right_padded(pad_id: int = 0):
    """Three rows of random ids; the first ends in EOS, the second is short."""
    ids = torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 9, dtype=torch.bool)
    ids[0, -1] = 2
    mask[1, 5:] = False
    ids[1, 5:] = pad_id
    return ids, mask


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny_llama_folder(tmp_path_factory.mktemp("plain"))


def test_moss_layout_scores_with_its_head_on_the_last_hidden_state(tmp_path):
    """Causal-LM keys and `reward_head.weight`."""
    state = tiny_llama(seed=3).state_dict() | {"reward_head.weight": torch.linspace(-1, 1, 64).unsqueeze(0)}
    tiny_llama_config().save_pretrained(tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin")
    model = load_scalar_model(str(tmp_path), FP32, CPU)
    ids, mask = right_padded()
    hidden = tiny_llama(seed=3).model(input_ids=ids[1:2, :5]).last_hidden_state
    expected = hidden[0, -1] @ state["reward_head.weight"][0]
    torch.testing.assert_close(last_scores(model(ids, mask), mask)[1], expected)


def test_a_causal_lm_gets_a_seeded_head_of_the_right_scale(plain):
    lines = []
    model = load_scalar_model(str(plain), FP32, CPU, seed=7, say=lines.append)
    assert "no reward head" in lines[0]
    assert torch.equal(model.head.weight, new_head_weight(64, 7))
    assert not torch.equal(new_head_weight(64, 7), new_head_weight(64, 8))
    weight = new_head_weight(4096, 0)
    assert weight.std().item() == pytest.approx(1 / 4097**0.5, rel=0.05)
    assert abs(weight.mean().item()) < 4 / 4097  # four standard errors of a mean of 4096


def test_saved_folder_gives_the_same_scores_in_transformers(plain, tmp_path):
    tokenizer = load_tokenizer(str(plain))
    model = load_scalar_model(str(plain), FP32, CPU, say=str)
    save_scalar_model(model, str(tmp_path / "out"), tokenizer=tokenizer)
    other, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids, mask = right_padded(tokenizer.pad_token_id)
    ours = last_scores(model(ids, mask), mask)
    torch.testing.assert_close(ours, other(ids, attention_mask=mask.long()).logits.squeeze(1))
    again = load_scalar_model(str(tmp_path / "out"), FP32, CPU)
    assert torch.equal(last_scores(again(ids, mask), mask), ours)


def test_a_tokenizer_that_pads_with_its_eos_is_saved_with_another_pad(plain, tmp_path):
    tokenizer = load_tokenizer(str(plain))
    tokenizer.pad_token = tokenizer.eos_token
    model = load_scalar_model(str(plain), FP32, CPU, say=str)
    save_scalar_model(model, str(tmp_path / "out"), tokenizer=tokenizer)
    assert tokenizer.pad_token_id == 2  # the caller's is left alone
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert other.config.pad_token_id == load_tokenizer(str(tmp_path / "out")).pad_token_id != 2
    ids, mask = right_padded(other.config.pad_token_id)
    torch.testing.assert_close(last_scores(model(ids, mask), mask), other(ids).logits.squeeze(1))
    tokenizer.stop_ids, tokenizer.pad_token = (0, 2), tokenizer.convert_ids_to_tokens(0)
    assert with_distinct_pad(tokenizer).pad_token_id == 1
    tokenizer.stop_ids = (2,)
    assert with_distinct_pad(tokenizer) is tokenizer


def test_given_state_is_what_is_written_in_its_dtype(plain, tmp_path):
    model = load_scalar_model(str(plain), torch.bfloat16, CPU, say=str)
    state = {name: p.detach() + 1 for name, p in model.named_parameters()}
    save_scalar_model(model, str(tmp_path / "out"), state)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["score.weight"], state["head.weight"])
    assert torch.equal(written["model.norm.weight"], state["backbone.norm.weight"])
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert not list(tmp_path.glob("*.partial"))


def test_a_center_is_kept_in_the_config_and_taken_off_every_score(plain, tmp_path):
    """Ours are lower than those of other tools by score_center; a folder that is centred again adds up."""
    model = load_scalar_model(str(plain), FP32, CPU, say=str)
    ids, mask = right_padded()
    raw = last_scores(model(ids, mask), mask)
    save_scalar_model(model, str(tmp_path / "once"), center=0.75)
    once = load_scalar_model(str(tmp_path / "once"), FP32, CPU)
    torch.testing.assert_close(last_scores(once(ids, mask), mask), raw - 0.75)
    assert torch.equal(once(ids, mask)[1, 5:], torch.zeros(4))
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path / "once")
    theirs = other(ids, attention_mask=mask.long()).logits.squeeze(1)
    torch.testing.assert_close(theirs - other.config.score_center, raw - 0.75)
    save_scalar_model(once, str(tmp_path / "twice"), center=-0.5)
    assert load_scalar_model(str(tmp_path / "twice"), FP32, CPU).score_center == 0.25


def test_dropout_only_if_set_and_in_training(tmp_path):
    folder = tiny_llama_folder(tmp_path, tokenizer=False, attention_dropout=0.5)
    model = load_scalar_model(str(folder), FP32, CPU, say=str).train()
    ids, mask = right_padded()
    assert torch.equal(model(ids, mask), model(ids, mask))
    set_dropout(model.eval(), 0.5)
    assert torch.equal(model(ids, mask), model(ids, mask))
    model.train()
    assert not torch.equal(model(ids, mask), model(ids, mask))
    for layer in model.backbone.layers:
        del layer.self_attn.attention_dropout
    with pytest.raises(UserError, match="--simcse_coef: a llama model has no dropout"):
        set_dropout(model, 0.5)


def test_bf16_weights_stay_bf16_and_scores_are_float32(plain, monkeypatch):
    monkeypatch.setattr(utils.models.padding_free, "FLOAT_TOKENS", 0)  # transformers' own attention
    model = load_scalar_model(str(plain), torch.bfloat16, CPU, say=str)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    ids = right_padded()[0][:1, :5]
    scores = model(ids, torch.ones_like(ids))
    assert scores.dtype == torch.float32
    states = model.backbone(input_ids=ids).last_hidden_state.double()
    torch.testing.assert_close(scores[0].double(), states[0] @ model.head.weight[0].double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_moss_zh_tags_resize_the_embedding_with_mean_rows(tmp_path, tied):
    folder = tiny_llama_folder(tmp_path, tie_word_embeddings=tied)
    tokenizer = load_tokenizer(str(folder), "moss_zh")
    lines = []
    scalar = load_scalar_model(str(folder), FP32, CPU, tokenizer=tokenizer, say=lines.append)
    assert "resized from 400 to 402" in lines[0]
    lm = load_causal_lm(str(folder), FP32, CPU, tokenizer=tokenizer, say=str)
    for rows in (scalar.backbone.embed_tokens.weight, lm.model.embed_tokens.weight, lm.lm_head.weight):
        assert rows.shape[0] == 402
        torch.testing.assert_close(rows[400:], rows[:400].mean(0).expand(2, -1))
    assert (lm.lm_head.weight is lm.model.embed_tokens.weight) == tied


def test_nll_of_the_answer_is_the_causal_lms_own(plain):
    model = load_scalar_model(str(plain), FP32, CPU, with_lm_head=True, say=str)
    ids, mask = right_padded()
    answer = mask.clone()
    answer[:, :3] = False
    logprobs = tiny_llama()(input_ids=ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    expected = -logprobs[answer[:, 1:]].sum()
    torch.testing.assert_close(model(ids, mask, answer)[1], expected)
