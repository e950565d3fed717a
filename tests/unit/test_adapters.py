"""Adapters on a frozen decoder: off, on, merged, written, read by peft and by this toolkit."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from ppo.models import PolicyModel
from tests.helpers.parts import ppo_config
from tests.helpers.tiny import tiny_llama_folder
from utils.errors import UserError
from utils.models.adapter_folder import load_adapter, write_adapter
from utils.models.adapters import train_adapter
from utils.models.export import merged_tensors
from utils.models.load import load_causal_lm

CPU = torch.device("cpu")
IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path):
    return tiny_llama_folder(tmp_path / "base", seed=1)


def load(path):
    return load_causal_lm(str(path), torch.float32, CPU, say=str)


def policy(lm, *names, **flags):
    """A policy with random adapters of these names."""
    model = PolicyModel(lm)
    for name in names:
        train_adapter(model, model.decoder, name, ppo_config(lora_rank=3, **flags))
        randomise(model, name)
    return model


def randomise(model, name, seed=0):
    draw = torch.Generator().manual_seed(seed + len(name))
    for layer in model.adapted:
        weight = layer.lora_B[name].weight
        weight.data = torch.randn(weight.shape, generator=draw) / 10


@torch.no_grad()
def logits(model):
    model.activate()
    return model.lm(IDS).logits


def test_without_its_adapters_a_model_is_its_base_bit_for_bit(folder):
    lm = load(folder)
    before = lm(IDS).logits
    model, reference = policy(lm, "one", "two"), PolicyModel(lm)
    reference.share(reference.decoder)
    assert not torch.equal(logits(model), before)
    assert torch.equal(logits(reference), before)
    assert not torch.equal(logits(model), before)


@pytest.mark.parametrize("flags", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_alpha": 1.0}], ids=str)
def test_a_new_adapter_changes_nothing_and_says_so(folder, flags):
    lm = load(folder)
    before, model = lm(IDS).logits, PolicyModel(lm)
    train_adapter(model, model.decoder, "one", ppo_config(lora_rank=3, **flags))
    torch.testing.assert_close(logits(model), before)
    assert model.is_unchanged() is ("use_dora" not in flags)
    randomise(model, "one")
    assert not model.is_unchanged()


@pytest.mark.parametrize("flags", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("names", [("one",), ("one", "two")], ids=len)
def test_written_adapters_are_read_by_peft_and_merged(folder, tmp_path, names, flags):
    if len(names) > 1 and "use_dora" in flags:
        pytest.skip("norms of columns do not add up")
    model = policy(load(folder), *names, **flags)
    write_adapter(model, model.decoder, str(folder), f"{tmp_path}/adapter")
    expected = logits(model)
    theirs = AutoPeftModelForCausalLM.from_pretrained(f"{tmp_path}/adapter")
    torch.testing.assert_close(theirs(IDS).logits, expected)
    torch.testing.assert_close(load(tmp_path / "adapter")(IDS).logits, expected)
    merged = AutoModelForCausalLM.from_pretrained(folder)
    state = {name.removeprefix("lm."): x for name, x in merged_tensors(model)}
    assert state.keys() == dict(merged.named_parameters()).keys()
    merged.load_state_dict(state)
    torch.testing.assert_close(merged(IDS).logits, expected)
    assert torch.equal(logits(model), expected)  # merging has left the model as it was


def test_an_adapter_on_an_adapter(folder, tmp_path):
    first = policy(load(folder), "one")
    write_adapter(first, first.decoder, str(folder), f"{tmp_path}/first")
    second = policy(load(tmp_path / "first"), "two")
    write_adapter(second, second.decoder, f"{tmp_path}/first", f"{tmp_path}/second")
    torch.testing.assert_close(load(tmp_path / "second")(IDS).logits, logits(second))


def test_an_adapter_of_another_model_is_refused(folder, tmp_path):
    model = policy(load(folder), "one")
    write_adapter(model, model.decoder, str(folder), f"{tmp_path}/adapter")
    other = tiny_llama_folder(tmp_path / "other", seed=2, num_hidden_layers=1)
    with pytest.raises(UserError, match="adapter"):
        load_adapter(load(other).base_model, "one", tmp_path / "adapter", "--policy_model_path")
