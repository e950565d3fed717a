"""Decoding at 7B: milliseconds, host time, launches and kernels of a step of 16 to 64 slots, in each way there is."""

import contextlib
import traceback
from dataclasses import replace
from types import SimpleNamespace

import torch

from benchmarks.random_inputs import MODELS, random_ids, random_lm
from benchmarks.timing import Timing, copy_rate, kernels, measure
from ppo.decoding.attention import grouped
from ppo.decoding.cuda_graphs import StepGraphs
from ppo.decoding.llama_step import can_run_triton
from ppo.decoding.sampling import Sampling
from ppo.decoding.scheduler import Decoder, DecodingOptions
from ppo.models import PolicyModel
from tests.gpu.attention import kernel_runs
from utils.engine.engine import device
from utils.models.check import distance

AIM = 0.6  # of the bytes' bound, 16 slots of 7B
LIMIT = 96  # tokens of a response, of which each way makes fewer
TOLERANCE = 0.1  # deviations by which logits may be apart from the model's own; rounding to bf16 makes about 0.02
NO_EOS = SimpleNamespace(eos_token_id=-1, pad_token_id=0)
SHAPES = {  # model -> slots and longest prompt
    "7B": [(16, 512), (16, 1536), (32, 512), (32, 1536), (64, 512), (64, 1536)],
    "8B": [(16, 1536), (64, 1536)],  # where heads share keys
}
WAYS = {  # name -> (flags of DecodingOptions, steps that are timed)
    "graphs": ({"llama_step": True, "triton": True, "cuda_graphs": True}, 64),
    "ragged": ({"llama_step": True, "triton": True}, 32),
    "straight": ({"llama_step": True}, 16),
    "own": ({}, 8),
}


def check(toy: bool, report) -> None:
    """Figures MODEL_SLOTS_PROMPT_LENGTHS: those of `measure_ways`. LENGTHS: of prompts, all PROMPT or up to it."""
    rate = copy_rate(device(), 1 << 22 if toy else None)
    report(copy_tb_per_s=rate / 1e12, aim_share=AIM)
    for name, shapes in ({"tiny": [(2, 24)]} if toy else SHAPES).items():
        model = None  # its memory goes to the next one
        dtype = torch.float32 if toy else torch.bfloat16  # Triton's interpreter multiplies bf16 as integers
        model = PolicyModel(random_lm(MODELS[name], dtype, device()).eval())
        for slots, prompt in shapes:
            for kind in ("equal", "ragged"):
                if not toy and report.seconds_left() < 8:
                    return
                setting = f"{name}_{slots}_{prompt}_{kind}"
                try:
                    # A profile takes as long as many steps: one of each number of slots shows what is launched.
                    profile = kind == "equal" and prompt <= 512
                    measure_ways(model, (slots, prompt, kind), rate, setting, profile, report)
                except torch.OutOfMemoryError as error:
                    report(**{setting: f"out of memory: {error}"})
                torch.cuda.empty_cache()


@torch.no_grad()
def measure_ways(
    model: PolicyModel, shape: tuple[int, int, str], rate: float, setting: str, profile: bool, report
) -> None:
    """Reports on each way, all from the same cache. shape: slots, prompt, lengths."""
    decoder = filled(model, *shape)
    start, figures, logits = Start(decoder), {}, {}
    weights = sum(p.nbytes for part in (model.decoder.layers, model.lm.lm_head) for p in part.parameters())
    token = sum(x[0, :, 0].nbytes for layer in decoder.cache.layers for x in (layer.keys, layer.values))
    for way, (flags, steps) in ways_of(model).items():
        try:
            with contextlib.nullcontext() if way == "own" else grouped(model.lm.config):
                logits[way], timing = time_way(start, flags, steps)
                more = profiled(decoder) if profile else {}
        except Exception as error:  # noqa: BLE001  where kernels cannot be made, say: the other ways count all the same
            traceback.print_exc()
            report(**{f"{setting}_{way}_error": f"{type(error).__name__}: {error}"[:300]})
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
            report.expect(out_of_memory, f"{setting}: {way} fails: {type(error).__name__}")
            continue
        plain = bool(flags.get("cuda_graphs") and StepGraphs.failed)
        report.expect(not plain, f"{setting}: graphs cannot be made; the figures of {way} are those of plain calls")
        live = sum(start.lengths) + shape[0] * (steps // 2 + 3)
        figures[way] = more | {
            "ms": 1e3 * timing.device, "spread": timing.spread, "host_ms": 1e3 * timing.host,
            "tokens_per_s": shape[0] / timing.device,
            "share_of_bound": (weights + token * live) / rate / timing.device,
        }  # fmt: skip
        report(**{setting: figures, f"{setting}_{way}_ms": 1e3 * timing.device})
    if "own" not in logits or len(figures) < 2:
        return
    for way, found in logits.items():
        apart = figures[way]["logits_apart"] = distance([found], [logits["own"]])
        text = f"{setting}: logits of {way} are {apart:.2g} deviations off the model's own, expected {TOLERANCE}"
        report.expect(apart <= TOLERANCE, text)
    report(**{setting: figures, f"{setting}_share": next(iter(figures.values()))["share_of_bound"]})


def time_way(start: "Start", flags: dict[str, bool], steps: int) -> tuple[torch.Tensor, Timing]:
    """(logits of the first step, the steps' times)."""
    decoder, logits = start.decoder, []
    decoder.options = replace(start.options, **flags)
    decoder.graphs = StepGraphs() if flags.get("cuda_graphs") else None
    decoder.watch = lambda x: logits.append(x.clone())
    for _ in range(3):  # the second step captures a graph, the third is one
        start.again()
        decoder.forward()
    decoder.watch = None
    return logits[-1], measure(decoder.forward, steps)


def ways_of(model: PolicyModel) -> dict[str, tuple[dict[str, bool], int]]:
    """The WAYS that this model can take here. On a CPU: in Triton's interpreter, without graphs, one step."""
    if device().type == "cpu":
        ragged = {"ragged"} if kernel_runs() else set()
        return {name: (flags, 1) for name, (flags, _) in WAYS.items() if name in {"straight", "own"} | ragged}
    return {name: way for name, way in WAYS.items() if can_run_triton(model.decoder) or not way[0].get("triton")}


def profiled(decoder: Decoder) -> dict:
    """One step: milliseconds that the device works, number of kernels, launches by the host, the longest kernels."""
    found, launches = kernels(decoder.forward)
    busy = sum(kernel.seconds for kernel in found)
    largest = [(kernel.name[:80], kernel.count, round(1e6 * kernel.seconds)) for kernel in found[:10]]
    counts = {"kernels": sum(kernel.count for kernel in found), "launches": launches}
    return {"busy_ms": 1e3 * busy, "largest": largest} | counts


def filled(model: PolicyModel, slots: int, prompt: int, kind: str) -> Decoder:
    """A decoder whose slots all hold a prompt and a first token, with room for LIMIT more in each."""
    least = prompt if kind == "equal" else prompt // 8
    lengths = torch.linspace(least, prompt, slots).int().tolist()
    prompts = random_ids(lengths, torch.Generator().manual_seed(0))
    options = DecodingOptions(slots, prefill_tokens=8192)
    decoder = Decoder(model, prompts, list(range(slots)), [LIMIT] * slots, Sampling(), 0, NO_EOS, options, device())
    while decoder.waiting:
        decoder.forward()
    return decoder


class Start:
    """A decoder's state besides keys and values, whose later columns are written again: enough to start again from."""

    def __init__(self, decoder: Decoder):
        self.decoder, self.options = decoder, decoder.options
        self.slots = {name: x.clone() for name, x in decoder.slots.items()}
        self.end, self.lengths = decoder.cache.end, list(decoder.cache.lengths)

    def again(self) -> None:
        """Puts the decoder back to where it was."""
        for name, x in self.slots.items():
            self.decoder.slots[name].copy_(x)
        cache = self.decoder.cache
        cache.end, cache.lengths, cache.first_is_old = self.end, list(self.lengths), True
