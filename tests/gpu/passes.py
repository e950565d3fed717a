"""Scoring, and forward and backward with checkpointing, of 8,192 tokens by a 7B policy: speed, memory, `--plan`."""

import tempfile
from functools import partial

import torch

from benchmarks.ppo_step import forward_flops
from benchmarks.random_inputs import MODELS, config_of, random_lm
from benchmarks.timing import GIB, matrix_rate, measure, peak_of
from ppo.config import PPOConfig
from ppo.models import PolicyModel
from ppo.planning.plan import PHASES, plan
from ppo.types import Rollout
from utils.engine.engine import device
from utils.models.load import enable_checkpointing, training_mode

ROWS, TOKENS, RESPONSE = 8, 8192, 256
AIMS = {"score": 0.5, "update": 0.45}  # of the measured matrix rate
TOLERANCE = 0.1  # mean difference of log-probabilities; those of other tokens are 1.4 apart


def check(toy: bool, report) -> None:
    """Figures WAY_PASS: seconds, share of the matrix rate in useful FLOPs, peak GiB, and what `--plan` says of it.

    Ways: rows padded to the longest, and joined end to end where that is done here.
    """
    name, shrink = ("tiny", 64) if toy else ("7B", 1)
    rate = matrix_rate(device(), torch.bfloat16, 128 if toy else None)
    rollout = random_rollout(TOKENS // ROWS // shrink, RESPONSE // shrink)
    lm = random_lm(MODELS[name], torch.bfloat16, device())
    enable_checkpointing(lm)
    model = PolicyModel(lm)
    flops = forward_flops(model, rollout, with_head=True)
    planned = planned_gib(name, shrink)
    padding = 1 - float(rollout.attention_mask.float().mean())
    report(matrix_tflop_per_s=rate / 1e12, useful_tflop=flops / 1e12, padding=padding)
    report(**{f"{pass_}_aim": aim for pass_, aim in AIMS.items()}, **{f"planned_{p}_gib": planned[p] for p in AIMS})
    logprobs = {}
    for way in ("padded", "joined"):
        model.decoder.keeps_padding = way == "padded"
        if way == "joined" and not model.joins_rows:
            report(joined="not with this version of torch, on this device")
            continue
        model.eval()
        with torch.no_grad():
            logprobs[way] = forward(model, rollout)[0]
            figures = run(partial(forward, model, rollout), flops / rate, planned["score"])
        report(**{f"{way}_score_{key}": value for key, value in figures.items()})
        training_mode(model)
        figures = run(partial(backward, model, rollout), 3 * flops / rate, planned["update"])
        report(**{f"{way}_update_{key}": value for key, value in figures.items()})
        model.zero_grad()
        report.expect(bool(logprobs[way].isfinite().all()), f"log-probabilities of {way} rows are not finite")
    if len(logprobs) == 2:
        apart = float((logprobs["padded"] - logprobs["joined"]).abs().sum() / rollout.response_mask.sum())
        report(logprobs_apart=apart)
        text = f"log-probabilities of joined and padded rows are {apart:.2g} apart, expected {TOLERANCE}"
        report.expect(apart <= TOLERANCE, text)


def run(function, floor: float, planned: float) -> dict[str, float]:
    """Seconds, peak GiB, and what share they are of the floor in seconds and of the planned GiB."""
    timing = measure(function, repeats=3, warm_up=1)
    _, peak = peak_of(function)
    shares = {"share": floor / timing.device, "gib_of_planned": peak / planned}
    return {"s": timing.device, "spread": timing.spread, "gib": peak} | shares


def forward(model: PolicyModel, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies."""
    return model(rollout.sequences, rollout.response_mask, 1.0)


def backward(model: PolicyModel, rollout: Rollout) -> None:
    """Adds gradients up in bf16, as several micro-batches do."""
    logprobs, entropy = forward(model, rollout)
    (-(logprobs + 0.01 * entropy).sum() / rollout.response_mask.sum()).backward()


def random_rollout(longest: int, response: int) -> Rollout:
    """ROWS rows of three quarters of `longest` to all of it; the last `response` tokens of each are sampled."""
    lengths = torch.linspace(0.75 * longest, longest, ROWS).int()[:, None]
    places = torch.arange(longest)
    mask = places < lengths
    ids = torch.randint(3, 32000, mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    sampled = mask & (places >= lengths - response)
    return Rollout(ids, mask, sampled, mask.any(1)).map(lambda x: x.to(device()))


def planned_gib(name: str, shrink: int) -> dict[str, float]:
    """What `--plan` predicts for weights, gradients, activations and logits of the policy alone."""
    with tempfile.TemporaryDirectory() as folder:
        config_of(MODELS[name]).save_pretrained(folder)
        config = PPOConfig(
            policy_model_path=folder, critic_model_path=folder, data_path="-", dtype="bf16",
            gradient_checkpoint=True, maxlen_prompt=TOKENS // ROWS // shrink, maxlen_res=RESPONSE // shrink,
            micro_batch_tokens=TOKENS // shrink,
        )  # fmt: skip
        rows = plan(config, 1).rows
    planned = {}
    for pass_, phase, copies in (("score", "score", 1), ("update", "backward", 2)):  # weights; gradients of their size
        column = PHASES.index(phase)
        size = copies * rows["weights of the policy"][column] + rows["activations"][column] + rows["logits"][column]
        planned[pass_] = size / GIB
    return planned
