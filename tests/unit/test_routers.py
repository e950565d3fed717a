"""The load-balancing loss of routers against transformers' own, whole and in micro-batches, in SFT and in PPO."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from data.batching.micro_batch_plan import rank_plan
from data.dialogues import EncodedDialogue
from ppo.decoding.sampling import Sampling
from ppo.models import PolicyModel
from ppo.rollout import PolicySampler
from ppo.update import policy_backward, shares
from sft.config import SFTConfig
from sft.model import AnswerModel
from sft.packed_batches import Layout
from sft.stage import build_stage, evaluate_answers
from tests.helpers.mixtures import MIXTURES, router_weights, tiny_mixture
from tests.helpers.parts import (
    PROMPTS,
    VOCAB_SIZE,
    GradientEngine,
    ppo_config,
    prompts_of,
    rollout_by_hand,
    scored,
    tiny_models,
    token_ids,
)
from tests.helpers.tiny import tiny_llama
from utils.errors import UserError
from utils.models.load import enable_checkpointing
from utils.models.routers import ROUTER_METRICS, router_coef, router_sums
from utils.run.supervised_loop import train_step
from utils.sums import Sums, means

COEF = 0.3


def own_loss(lm, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """transformers' load-balancing loss."""
    return lm(input_ids=ids, attention_mask=mask.long(), labels=ids, output_router_logits=True).aux_loss


def policy_of(lm, coef: float = COEF) -> GradientEngine:
    return GradientEngine(PolicyModel(lm, router_coef=coef))


def mixture_models(kind: str = "mixtral", coef: float = COEF, **changes):
    models = tiny_models()
    models.policy = policy_of(tiny_mixture(kind, VOCAB_SIZE, **changes), coef)
    return models


def gradient(engine: GradientEngine, experience, config) -> tuple[Sums, dict[str, torch.Tensor]]:
    engine.module.zero_grad()
    _, sums = policy_backward(engine, experience, config, None)
    return sums, {name: p.grad.clone() for name, p in engine.module.lm.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("max_tokens", [10, 10_000])
@pytest.mark.parametrize("kind", MIXTURES)
def test_the_policys_loss_and_gradient_gain_transformers_own_term(kind, max_tokens):
    """That of each micro-batch counts by its share of all tokens, prompts included."""
    models = mixture_models(kind)
    experience, config = scored(rollout_by_hand(), models, micro_batch_tokens=max_tokens)
    sums, whole = gradient(models.policy, experience, config)
    lm, tokens = models.policy.module.lm, float(experience.attention_mask.sum())
    _, without = gradient(policy_of(lm, 0.0), experience, config)
    lm.zero_grad()
    parts = list(shares(experience, max_tokens))
    assert (len(parts) > 2) is (max_tokens == 10)
    expected = sum(
        part.attention_mask.sum() / tokens * own_loss(lm, part.sequences, part.attention_mask) for part in parts
    )
    assert expected.item() > 2.02  # it is 2 where the load is even
    assert sums["router_aux_loss"][1] == tokens
    assert means(sums)["router_aux_loss"] == pytest.approx(expected.item(), rel=1e-5)
    (COEF * expected).backward()
    for name, parameter in lm.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(whole[name] - without[name], parameter.grad, atol=1e-6, rtol=1e-3)
    assert all(weight.grad.abs().max() > 1e-4 for weight in router_weights(lm))


def test_checkpointing_changes_no_gradient():
    results = []
    for checkpointing in (False, True):
        models = mixture_models()
        experience, config = scored(rollout_by_hand(), models)
        if checkpointing:
            enable_checkpointing(models.policy.module.lm)
        models.policy.module.train()
        results.append(gradient(models.policy, experience, config))
    (plain_sums, plain), (sums, other) = results
    assert means(sums) == means(plain_sums) and set(ROUTER_METRICS) < set(sums)
    assert all(torch.equal(tensor, other[name]) for name, tensor in plain.items())


def test_statistics_by_hand():
    """Three experts, one choice; of three tokens that count two take expert 0, in the other layer all."""
    peaked = 200.0 * torch.eye(3)
    layers = [peaked[[0, 0, 1, 2]], peaked[[0, 0, 0, 0]]]
    counted = torch.tensor([[True, True], [True, False]])
    loss, load, entropy = (router_sums(layers, counted, 1) / 3).tolist()
    assert loss == pytest.approx(3 * ((5 / 6) ** 2 + (1 / 6) ** 2))  # of both layers: 5/6 of all choices are expert 0
    assert load == pytest.approx(3 * (2 / 3 + 1) / 2)
    assert entropy == pytest.approx(0.0, abs=1e-6)
    assert (router_sums([torch.zeros(4, 3)], counted, 1) / 3)[2].item() == pytest.approx(math.log(3))
    assert router_sums(layers, counted & False, 1).tolist() == [0.0, 0.0, 0.0]


def dialogues() -> list[EncodedDialogue]:
    generator = torch.Generator().manual_seed(1)
    lengths = [13, 5, 9, 3, 7, 2, 11, 8]
    ids = [torch.randint(0, 60, (length,), generator=generator).tolist() for length in lengths]  # 0 is no padding
    return [EncodedDialogue(x, [t > 0 and t % 3 > 0 for t in range(len(x))], "x") for x in ids]


@pytest.mark.parametrize(("packing", "max_tokens"), [(False, 16), (True, 16), (False, 10_000)])
def test_a_step_of_sft(packing, max_tokens):
    """The loss is the answers' and COEF times transformers' own, each forward by its tokens; padding never counts."""
    lm = tiny_mixture(vocab=60)
    config = SFTConfig(hf_model_name_or_path="M", model_save_path="O", data_path=["D"], dtype="fp32", zero_stage=0)
    layout, items = Layout(packing, flat=False, max_tokens=64), dialogues()
    model = AnswerModel(lm)
    engine = GradientEngine(model)
    stages = [build_stage(config, model, None, layout, iter([items]), [], balance) for balance in (0.0, COEF)]
    plan = partial(rank_plan, max_tokens=max_tokens, num_ranks=1, rank=0)
    off, on = (train_step(engine, replace(stage, plan=plan), layout.rows(items, 1), 0.0) for stage in stages)
    assert set(on) - set(off) == {"lm_loss", *ROUTER_METRICS}
    rows, expected, tokens = layout.rows(items, 1), 0.0, sum(len(item.ids) for item in items)
    for part, _ in plan([row.tokens for row in rows]):
        chosen = [rows[i] for i in part]
        ids, _, positions = layout.collate(chosen)
        mask = torch.tensor([[t < row.tokens for t in range(ids.shape[1])] for row in chosen])
        output = lm.model(input_ids=ids, position_ids=positions, use_cache=False, output_router_logits=True)
        real = [logits[mask.flatten()] for logits in output.router_logits]
        own = load_balancing_loss_func(tuple(real), 4, 2)
        expected += own.item() * int(mask.sum()) / tokens
    assert on["router_aux_loss"] == pytest.approx(expected, rel=1e-5)
    assert on["lm_loss"] == pytest.approx(off["loss"], rel=1e-6)
    assert on["loss"] == pytest.approx(off["loss"] + COEF * expected, rel=1e-5)
    assert on["grad_norm"] != pytest.approx(off["grad_norm"], rel=1e-3)
    # Evaluations are about the answers alone.
    assert evaluate_answers(engine, rows, stages[0]) == evaluate_answers(engine, rows, stages[1])


def test_the_weight_is_the_configs_or_the_flags():
    mixture, llama = (
        tiny_mixture(router_aux_loss_coef=0.02),
        tiny_llama(router_aux_loss_coef=0.1, num_experts_per_tok=2),
    )
    assert [router_coef(mixture, flag, "M") for flag in (None, 0.5, 0.0)] == [0.02, 0.5, 0.0]
    assert [router_coef(llama, flag, "M") for flag in (None, 0.0)] == [0.0, 0.0]
    with pytest.raises(UserError, match=r"--router_aux_loss_coef 0.1: --policy_model_path M, a LlamaFor"):
        router_coef(llama, 0.1, "--policy_model_path M")


def test_a_config_that_asks_for_router_logits_decodes_the_same():
    """The LM's own forward then computes their loss, for which a mask that covers the cache has the wrong shape."""
    plain, asking = (PolicyModel(tiny_mixture(vocab=VOCAB_SIZE, output_router_logits=on)) for on in (False, True))
    found = [
        PolicySampler(GradientEngine(policy), token_ids(), ppo_config())(prompts_of(*PROMPTS), Sampling(), 1).sequences
        for policy in (plain, copy.deepcopy(asking))
    ]
    assert torch.equal(*found)
