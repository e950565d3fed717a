"""Adapters of every family: written, read by peft and by this toolkit, and merged, they are the same function."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from ppo.models import PolicyModel
from tests.architectures.configs import FAMILIES, SHORT, tiny_config
from tests.helpers.parts import ppo_config
from utils.errors import UserError
from utils.models.adapter_folder import write_adapter
from utils.models.adapters import NOT_READ, train_adapter
from utils.models.export import merged_tensors
from utils.models.load import attention_cap, load_causal_lm

IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))


def base_of(name, folder):
    """The policy of a family with random weights. Raises UserError if it is refused, other errors if it has none."""
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(tiny_config(name)).save_pretrained(folder / "base")
    model = PolicyModel(load_causal_lm(str(folder / "base"), torch.float32, torch.device("cpu"), say=str))
    model.lm(IDS)
    return model


@torch.no_grad()
def check(model, folder):
    before = model.lm(IDS).logits
    train_adapter(model, model.decoder, "one", ppo_config(lora_rank=3))
    draw = torch.Generator().manual_seed(3)
    for layer in model.adapted:
        weight = layer.lora_B["one"].weight
        weight.copy_(torch.randn(weight.shape, generator=draw) / 10)
    model.activate()
    expected = model.lm(IDS).logits
    assert (expected - before).abs().max() > 1e-3
    write_adapter(model, model.decoder, str(folder / "base"), str(folder / "adapter"))
    options = {"attn_implementation": "eager"} if attention_cap(model.lm.config) else {}
    theirs = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter", dtype=torch.float32, **options).eval()
    torch.testing.assert_close(theirs(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    ours = load_causal_lm(str(folder / "adapter"), torch.float32, torch.device("cpu"), say=str)
    torch.testing.assert_close(ours(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    whole = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32, **options).eval()
    found = whole.load_state_dict({name.removeprefix("lm."): x for name, x in merged_tensors(model)}, strict=False)
    assert not found.unexpected_keys
    torch.testing.assert_close(whole(IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SHORT)
def test_adapters_of_a_family(name, tmp_path):
    check(base_of(name, tmp_path), tmp_path)


@pytest.mark.slow
def test_adapters_of_every_other_family_that_can_be_loaded(tmp_path):
    checked, wrong, refused = [], [], []
    for name in [family for family in FAMILIES if family not in SHORT]:
        (tmp_path / name).mkdir()
        try:
            model = base_of(name, tmp_path / name)
        except Exception:  # noqa: BLE001 - tests/unit/test_architectures.py says which, and why
            continue
        try:
            check(model, tmp_path / name)
            checked.append(name)
        except UserError as error:
            refused.append((name, str(error)))
        except Exception as error:  # noqa: BLE001
            wrong.append((name, str(error)[:300]))
    assert wrong == [], [name for name, _ in wrong]
    assert len(checked) >= 100
    assert {name for name, why in refused if "Mamba" not in why} == NOT_READ
