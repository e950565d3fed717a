"""Decoding steps with Triton's kernels and as CUDA graphs sample what a plain decode samples.

On a CPU kernels run in Triton's interpreter, and a graph is a list of a step's operations that is run again.
"""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

pytest.importorskip("triton", minversion=None if torch.cuda.is_available() else "3.7")

import ppo.decoding.ragged_attention
import ppo.decoding_check
import ppo.rollout
from ppo.decoding.cuda_graphs import StepGraphs
from ppo.decoding.kv_cache import SlotCache
from ppo.decoding.sampling import EVALUATION, Sampling
from ppo.decoding.scheduler import Decoder, DecodingOptions
from ppo.decoding_check import choose_decoding
from ppo.models import PolicyModel
from tests.helpers.parts import ppo_config, tiny_policy, token_ids
from tests.unit.test_decoding import LIMITS, PLACES, PROMPTS, decode, plain_decode

# 3 live slots are a bucket of 4.
OPTIONS = DecodingOptions(5, 64, steps_per_check=2, llama_step=True, triton=True, cuda_graphs=True)


class Operations(TorchDispatchMode):
    """Records every operation with its tensors; `replay` does them again and writes results to the same places."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.do(func, args, kwargs or {})

    def do(self, func, args, kwargs):
        with _disable_current_modes():
            result = func(*args, **kwargs)
        self.done.append((func, args, kwargs, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, kept in self.done:
            result = func(*args, **kwargs)
            pairs = zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (kept, result)), strict=True)
            for old, new in pairs:
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def recorded(monkeypatch) -> list[int]:
    """Records graphs as `Operations`. Returns the number of rows of each."""
    if torch.cuda.is_available():
        pytest.skip("here graphs are CUDA's")
    rows, current = [], []

    def capture(self, size, step):
        current.append(operations := Operations())
        with operations:
            output = step()
        current.pop()
        rows.append(len(output))
        first = [True]  # recording has done the step already

        def replay() -> None:
            if not first or first.pop() is None:
                operations.replay()

        self.graphs[size] = replay, output

    def kernel(function):
        return lambda *args: current[0].do(function, args, {}) if current else function(*args)

    monkeypatch.setattr(StepGraphs, "_capture", capture)
    for name in ("append_rotated", "attend"):
        monkeypatch.setattr(ppo.decoding.ragged_attention, name, kernel(getattr(ppo.decoding.ragged_attention, name)))
    return rows


def policy_of() -> PolicyModel:
    sizes = {"head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    policy = tiny_policy(max_position_embeddings=256, **sizes)
    for parameter in policy.parameters():
        parameter.data.mul_(4.0)  # far from uniform, so that a wrong position shows
    return policy


def test_graphs_equal_a_plain_decode(recorded):
    policy = policy_of()
    assert decode(policy, EVALUATION, 7, OPTIONS) == plain_decode(policy, EVALUATION, seed=7)
    assert set(recorded) >= {1, 4, 5} and len(recorded) == len(set(recorded))


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it can be made")
def test_a_graph_that_cannot_be_made_is_left_out(monkeypatch):
    monkeypatch.setattr(StepGraphs, "failed", [])
    # Two responses end; the last two take their slots, whose old ones fill up the bucket.
    work = policy_of(), [[1], [3], [4], [5], [6]], PLACES[:5], [2, 2, 7, 8, 9], Sampling(), 7, token_ids(eos=-1)
    with pytest.warns(UserWarning, match="without CUDA graphs, more slowly: "):
        found = Decoder(*work, OPTIONS, torch.device("cpu")).run()
    expected = Decoder(*work, DecodingOptions(5, 64, llama_step=True), torch.device("cpu")).run()
    assert [row.tolist() for row in found] == [row.tolist() for row in expected]
    assert len(StepGraphs.failed) == 1


def test_the_device_knows_what_each_slot_holds():
    """After new prompts, freed slots, and columns that move."""
    cache = SlotCache(4, 20, torch.device("cpu"))

    def check() -> None:
        mask = cache.advance()
        assert cache.newest == cache.end - 1
        columns = torch.arange(20)
        held = (columns >= cache.first[:, None]) & (columns <= cache.newest)
        assert torch.equal(held[: cache.live, cache.read], mask)
        assert torch.equal(held.sum(1), torch.tensor(cache.lengths + [0] * (4 - cache.live)))

    cache.append(torch.tensor([[False, True, True], [True, True, True]]), [2, 3], None)
    check()
    cache.append(torch.tensor([[True] * 6, [False] * 5 + [True]]), [6, 1], None)  # columns move to the right
    for _ in range(3):
        check()
    cache.keep([0, 3])
    for _ in range(12):  # and back to the left
        check()
    cache.append(torch.tensor([[True, True]]), [2], None)
    check()
    cache.keep([2])
    check()


@pytest.fixture
def on_any_device(monkeypatch):
    for module in (ppo.decoding_check, ppo.rollout):
        monkeypatch.setattr(module, "can_run_triton", lambda decoder: True)


def test_the_probe_tries_kernels_and_graphs_and_leaves_out_kernels_that_fail(recorded, on_any_device, monkeypatch):
    class CompilationError(Exception):  # not one that a model raises
        pass

    def fail(*_):
        raise CompilationError("no C compiler")

    heads = {"head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    policy, said = tiny_policy(max_position_embeddings=256, **heads).to(torch.bfloat16), []
    choose_decoding(policy, ppo_config(), "M", said.append)
    assert policy.decoding == "triton" and said == [] and set(recorded) == {4}
    policy = policy_of()
    for attend in (fail, lambda query, *_: query):
        monkeypatch.setattr(ppo.decoding.ragged_attention, "attend", attend)
        choose_decoding(policy, ppo_config(), "M", said.append)
    assert policy.decoding == "llama_step" and len(said) == 2
    assert "triton decoding is not used" in said[0] and "CompilationError: no C compiler" in said[0]
    assert "triton decoding is not used" in said[1] and "standard deviations" in said[1]


def test_no_graphs_where_deterministic_algorithms_are_asked_for(on_any_device):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        options = ppo.rollout.decoding_options(ppo_config(), policy_of())
    finally:
        torch.use_deterministic_algorithms(False)
    assert options.triton and not options.cuda_graphs


@pytest.mark.gpu
def test_random_numbers_after_a_capture_that_failed(monkeypatch):
    monkeypatch.setattr(StepGraphs, "failed", [])
    graphs, x = StepGraphs(), torch.ones(2, device="cuda")
    torch.cuda.manual_seed(3)
    expected = torch.rand(4, device="cuda")
    torch.cuda.manual_seed(3)
    with pytest.warns(UserWarning, match="without CUDA graphs"):
        for _ in range(3):  # .item() waits for the GPU, which ends a capture
            assert graphs.run(2, lambda: x * x.sum().item()).tolist() == [2.0, 2.0]
    assert len(StepGraphs.failed) == 1 and torch.equal(torch.rand(4, device="cuda"), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [Sampling(), EVALUATION], ids=["plain", "penalty and nucleus"])
@pytest.mark.parametrize("graphs", [False, True], ids=["kernels", "graphs"])
def test_on_a_gpu(sampling, graphs):
    policy, place = policy_of(), torch.device("cuda")
    expected = plain_decode(policy, sampling, seed=7)
    policy, captured = policy.to(place), []
    capture = StepGraphs._capture
    options = replace(OPTIONS, cuda_graphs=graphs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepGraphs, "_capture", lambda self, *args: captured.append(1) or capture(self, *args))
        found = Decoder(policy, PROMPTS, PLACES, LIMITS, sampling, 7, token_ids(), options, place).run()
    assert [row.tolist() for row in found] == expected
    assert bool(captured) == graphs and not StepGraphs.failed


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_chooses_kernels_on_a_gpu(dtype):
    policy, said = policy_of().to("cuda", dtype), []
    choose_decoding(policy, ppo_config(), "M", said.append)
    assert policy.decoding == "triton" and said == []


@pytest.mark.gpu
def test_no_step_waits_for_the_gpu():
    policy, place = policy_of().to("cuda"), torch.device("cuda")
    decoder = Decoder(policy, PROMPTS, PLACES, [40] * 13, Sampling(), 7, token_ids(eos=-1), OPTIONS, place)
    with torch.no_grad():
        while decoder.cache.live < 5:
            decoder.forward()  # over prompts
        try:
            for steps in (1, 20):  # the first compiles the kernels, and capturing waits
                torch.cuda.set_sync_debug_mode("error")
                for _ in range(steps):
                    decoder._next_tokens()
                torch.cuda.set_sync_debug_mode("default")
                decoder._next_tokens()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_graphs_are_gone_when_decoding_ends(monkeypatch):
    seen, build = [], StepGraphs.__init__
    monkeypatch.setattr(StepGraphs, "__init__", lambda self: (build(self), seen.append(weakref.ref(self)))[0])
    policy, place = policy_of().to("cuda"), torch.device("cuda")
    gc.disable()
    try:
        Decoder(policy, PROMPTS, PLACES, LIMITS, Sampling(), 7, token_ids(), OPTIONS, place).run()
        assert [graphs() for graphs in seen] == [None]
    finally:
        gc.enable()
