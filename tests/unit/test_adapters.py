"""Adapters on a frozen decoder: off, on, merged, written, read by peft and by this toolkit."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from peft.tuners import lora
from torch import nn
from transformers import AutoModelForCausalLM

from ppo.models import PolicyModel
from reward.model import ScalarHead, ScalarModel, train_scalar_adapter
from sft.model import AnswerModel
from tests.helpers.parts import ppo_config, tiny_scalar_model
from tests.helpers.tiny import tiny_llama_folder
from utils import hub
from utils.engine.engine import TrainEngine
from utils.errors import UserError
from utils.models.adapter_folder import load_adapter, write_adapter
from utils.models.adapters import Adapted, train_adapter, trained_parameters
from utils.models.export import merged_tensors
from utils.models.load import enable_checkpointing, load_causal_lm, tokenizer_folder, whole_model

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
    whole = load(tmp_path / "adapter")
    torch.testing.assert_close(whole(IDS).logits, expected)
    assert all(x.requires_grad for x in whole.parameters())  # to train all weights
    merged = AutoModelForCausalLM.from_pretrained(folder)
    state = {name.removeprefix("lm."): x for name, x in merged_tensors(model)}
    assert state.keys() == dict(merged.named_parameters()).keys()
    merged.load_state_dict(state)
    torch.testing.assert_close(merged(IDS).logits, expected)
    assert torch.equal(logits(model), expected)  # merging has left the model as it was


def test_bf16_weights_are_merged_in_float32_and_rounded_once(folder):
    model = policy(load_causal_lm(str(folder), torch.bfloat16, CPU, say=str), "one", "two")
    merged = dict(merged_tensors(model))
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            exact = layer.base_layer.weight.float()
            for key in ("one", "two"):
                exact = exact + layer.scaling[key] * (layer.lora_B[key].weight @ layer.lora_A[key].weight)
            assert layer.lora_A["one"].weight.dtype == torch.float32
            assert torch.equal(merged[f"{name}.weight"], exact.to(torch.bfloat16))
            assert not torch.equal(merged[f"{name}.weight"], layer.base_layer.weight)


def test_bf16_layers_compute_and_keep_nothing_in_float32_but_give_what_peft_gives(folder):
    model = policy(load_causal_lm(str(folder), torch.bfloat16, CPU, say=str), "one", "two")
    model.activate()
    layer, draw = model.adapted[0], torch.Generator().manual_seed(0)
    x = torch.randn(5, 7, layer.in_features, generator=draw).bfloat16().requires_grad_()
    weights = [part[name].weight for part in (layer.lora_A, layer.lora_B) for name in ("one", "two")]

    def passes(forward):
        dtypes = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: dtypes.add(x.dtype) or x, lambda x: x):
            output = forward(layer, x)
        return dtypes, [output, *torch.autograd.grad((output.float() - 1).square().sum(), [x, *weights])]

    (dtypes, ours), (of_peft, theirs) = passes(type(layer).forward), passes(lora.Linear.forward)
    assert dtypes == {torch.bfloat16} and torch.float32 in of_peft
    assert [one.dtype for one in ours] == [torch.bfloat16] * 2 + [torch.float32] * 4
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() < 0.01 * other.norm()
    assert (ours[0] - layer.base_layer(x)).norm() > 0.1 * ours[0].norm()


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


def fitted(parameters, loss):
    """The parameters at the minimum of a loss."""
    optimizer = torch.optim.LBFGS(parameters, max_iter=400, tolerance_grad=1e-7, tolerance_change=1e-12,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def test_an_adapter_of_full_rank_learns_what_all_weights_learn():
    """Least squares with one linear layer has one minimum; an adapter of half the rank does not reach it."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(200, 12), torch.randn(200, 8)

    def learnt(rank: int) -> torch.Tensor:
        model = Adapted()
        model.layers = nn.Sequential(nn.Linear(12, 8, bias=False))
        torch.manual_seed(1)
        nn.init.normal_(model.layers[0].weight)
        if rank:
            train_adapter(model, model.layers, "one", ppo_config(lora_rank=rank, lora_target_modules=["0"]))
        parameters = [*trained_parameters(model).values()]
        assert len(parameters) == (2 if rank else 1)
        fitted(parameters, lambda: (model.layers(inputs) - targets).square().sum())
        return model.layers(inputs).detach()

    whole = learnt(0)
    torch.testing.assert_close(learnt(8), whole, rtol=1e-3, atol=1e-3)
    assert (learnt(4) - whole).abs().max() > 0.05


def test_named_layers_get_a_second_adapter(folder):
    names = ["q_proj", "v_proj"]
    model = policy(load(folder), "policy", "critic", lora_target_modules=names)
    assert len(model.adapted) == 2 * model.lm.config.num_hidden_layers
    assert all({*x.lora_A} == {"policy", "critic"} for x in model.adapted)
    with pytest.raises(UserError, match=r"lora_A: a layer of this name does not exist; use all-linear, or down_proj, "):
        train_adapter(model, model.decoder, "third", ppo_config(lora_rank=3, lora_target_modules=["lora_A"]))


def test_each_model_trains_its_own_adapter_alone(folder):
    lm = load(folder)
    model, critic = policy(lm, "policy"), ScalarModel(lm.base_model, tiny_scalar_model().head)
    train_scalar_adapter(critic, "critic", ppo_config(lora_rank=3), rank=2)
    ours, theirs = trained_parameters(model), trained_parameters(critic)
    assert all(".policy." in name for name in ours)
    assert all(".critic." in name or name == "head.weight" for name in theirs) and "head.weight" in theirs
    assert len(ours) == len(theirs) - 1 and not {*map(id, ours.values())} & {*map(id, theirs.values())}
    frozen = [x for name, x in model.named_parameters() if "lora_" not in name]
    assert not any(x.requires_grad for x in frozen)
    assert {x.shape[0] for name, x in theirs.items() if "lora_A" in name} == {2}


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_a_bad_gradient_of_adapters_is_seen(folder, single_process, zero_stage):
    """Adapters have no parameters with one dimension, which are watched in models without."""
    model = policy(load(folder), "policy")
    engine = TrainEngine(model, ppo_config(lora_rank=3, zero_stage=zero_stage), "policy")
    mask = torch.ones_like(IDS, dtype=torch.bool)
    mask[:, 0] = False
    for factor, bad in ((1.0, False), (float("nan"), True), (1.0, False)):
        logprobs, _ = engine(IDS, mask)
        engine.backward(logprobs.sum() * factor)
        assert engine.bad_gradient() is bad
        engine.measure()
        engine.drop_gradients()


def test_adapters_that_do_not_add_up_are_refused(folder):
    for first, second in ((True, False), (False, True)):
        model = PolicyModel(load(folder))
        train_adapter(model, model.decoder, "one", ppo_config(lora_rank=3, use_dora=first))
        with pytest.raises(UserError, match=r"would have several adapters, of which one is DoRA's; merge the first"):
            train_adapter(model, model.decoder, "policy", ppo_config(lora_rank=3, use_dora=second))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"lora_bias": True}, "lora_bias is on"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters is on"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path"),
    ],
    ids=str,
)
def test_adapters_of_other_kinds_are_refused(folder, tmp_path, change, problem):
    model = policy(load(folder), "one")
    write_adapter(model, model.decoder, str(folder), f"{tmp_path}/adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(
        UserError, match=rf"not of a LoRA adapter that can be used here .*{problem}.*merge it with peft"
    ):
        load(tmp_path / "adapter")


def test_an_adapter_from_the_hub_on_a_model_from_the_hub(folder, tmp_path, monkeypatch):
    """The folders that downloads end in are there already; nothing is fetched."""
    model = policy(load(folder), "one")
    write_adapter(model, model.decoder, "someone/base", f"{tmp_path}/adapter")
    for name, place in (("someone/base", folder), ("someone/adapter", tmp_path / "adapter")):
        monkeypatch.setitem(hub.downloaded, (name, repr({"ignore_patterns": hub._BESIDE_WEIGHTS})), place)
    torch.testing.assert_close(load("someone/adapter")(IDS).logits, logits(model))
    assert whole_model("someone/adapter") == "someone/base"
    assert tokenizer_folder("someone/adapter") == folder  # the adapter's folder has none


def shared_models(folder):
    """A policy and a critic with random adapters on one decoder."""
    lm = load(folder)
    critic = ScalarModel(lm.base_model, ScalarHead(lm.config.hidden_size, 1, bias=False))
    model = policy(lm, "policy")
    train_scalar_adapter(critic, "critic", ppo_config(lora_rank=3))
    randomise(critic, "critic", seed=1)
    model.share(model.decoder, "policy")
    return model, critic


@torch.no_grad()
def test_every_forward_uses_the_models_own_adapters(folder):
    model, critic = shared_models(folder)
    answers = AnswerModel(model.lm)
    answers.share(model.decoder)
    mask = torch.ones_like(IDS, dtype=torch.bool)
    mask[:, 0] = False
    calls = {
        model: lambda: model(IDS, mask)[0],
        critic: lambda: critic(IDS, torch.ones_like(IDS)),
        answers: lambda: answers(IDS, mask),
    }
    expected = {}
    for one, call in calls.items():
        one.activate()
        one.activate = lambda: None  # no other model may change it meanwhile
        expected[one] = call()
        del one.activate
    for first in calls:
        for second, call in calls.items():
            first.activate()
            assert torch.equal(call(), expected[second])


def test_layers_that_are_computed_again_use_the_adapters_of_their_model(folder, single_process):
    """Also after a forward of another model on the same decoder."""
    model, critic = shared_models(folder)
    enable_checkpointing(model.lm)
    model.lm.train()
    engine = TrainEngine(model, ppo_config(lora_rank=3, zero_stage=0), "policy")
    mask = torch.ones_like(IDS, dtype=torch.bool)
    mask[:, 0] = False
    found = []
    for between in (lambda: None, lambda: critic(IDS, torch.ones_like(IDS))):
        loss = engine(IDS, mask)[0].sum()
        between()
        engine.backward(loss)
        found.append(torch.cat([x.grad.flatten().clone() for x in engine.parameters]))
        engine.measure()
        engine.drop_gradients()
    assert torch.equal(*found) and found[0].any()
