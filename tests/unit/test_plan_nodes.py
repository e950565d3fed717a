"""`--plan` for several nodes: what GPUs exchange, against real engines of 16 ranks and numbers worked out by hand."""

import json
import os
from dataclasses import replace

import deepspeed
import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ppo.models import PolicyModel
from ppo.planning.plan import fixed_rows, measured_sizes, plan, with_gathering
from ppo.planning.report import table
from ppo.planning.shapes import Shapes, models_of
from ppo.planning.step_time import Phase, checkpoint, phases
from tests.helpers.parts import ppo_config, tiny_models
from tests.helpers.tiny import tiny_llama
from tests.unit.test_plan import CRITIC_7B, LLAMA_7B, POLICY_7B, paths_7b  # noqa: F401 - a fixture
from utils.distributed import world_size
from utils.engine import engine as engines
from utils.engine.split import shard_frozen
from utils.memory.zero_bytes import moment_bytes

RING = {"allreduce_": 2, "_allgather_base_": 1, "_reduce_scatter_base_": 1}  # times (ranks - 1) / ranks: NCCL tests
BOTH = 2 * (POLICY_7B + CRITIC_7B) * 63 / 64  # bytes that each of 64 GPUs sends to gather policy and critic in bf16


@pytest.fixture
def sixteen_ranks():
    """This process is the first of 16, whose collectives return at once without a result."""
    if torch.distributed.is_initialized():  # by a test that ran in this process before
        engines.shutdown_distributed()
    before = dict(os.environ)
    os.environ.update(RANK="0", WORLD_SIZE="16", LOCAL_RANK="0", LOCAL_WORLD_SIZE="8")
    deepspeed.ops.__compatible_ops__ = {}
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=16)
    engines.init_distributed()
    yield
    engines.shutdown_distributed()
    os.environ.clear()
    os.environ.update(before)


class SentBytes(TorchDispatchMode):
    """Context that counts the bytes that this rank sends in its collectives, as a ring sends them."""

    def __init__(self):
        super().__init__()
        self.sent = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, _, name = str(function.overloadpacket).partition(".")
        if namespace == "c10d" and name in RING:
            whole = max(x.nbytes for x in tree_iter(args) if isinstance(x, torch.Tensor))
            self.sent += RING[name] * whole * (world_size() - 1) / world_size()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_engines_send_the_bytes_that_the_plan_says(sixteen_ranks, monkeypatch, zero_stage):
    """One optimizer step of two micro-batches; then the frozen model scores in two micro-batches."""
    if zero_stage == 3:  # of a large model it keeps little between passes
        settings = engines.deepspeed_config
        little = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}

        def deepspeed_config(config) -> dict:
            made = settings(config)
            return made | {"zero_optimization": made["zero_optimization"] | little}

        monkeypatch.setattr(engines, "deepspeed_config", deepspeed_config)
    sizes = {"num_rollouts": 32, "batch_size": 32, "micro_batch_tokens": 32, "gather_for_generation": "never"}
    config = ppo_config(zero_stage=zero_stage, dtype="bf16", reuse_sampler_logprobs=True, **sizes)
    module = PolicyModel(tiny_llama(1000, hidden_size=256, intermediate_size=512).to(torch.bfloat16))
    frozen = PolicyModel(tiny_llama(1000, hidden_size=256, intermediate_size=512).to(torch.bfloat16))
    work = Shapes([p.numel() for p in module.parameters()], module.decoder, True).work
    *_, scoring, update = phases(config, 16, {"policy": work}, [], 2, 0.0)

    ids = torch.arange(3, 35).view(2, 16)
    answer = (torch.arange(16) > 5).expand(2, -1)
    engine = engines.TrainEngine(module, config, "policy")
    with SentBytes() as counter:
        for _ in range(2):
            logprobs, _ = engine(ids, answer)
            engine.backward(logprobs.sum())
        engine.measure()
        engine.apply(1e-3)
    assert counter.sent == pytest.approx(update.sent, rel=0.01)  # 0.4 % are norms, which are gathered after the step

    reference = shard_frozen(frozen, config)
    with torch.no_grad(), SentBytes() as counter:
        for _ in range(2):
            reference(ids, answer)
    assert counter.sent == pytest.approx(scoring.sent, rel=0.01)


def found(paths: dict, gpus: int = 64, **changes) -> dict[str, Phase]:
    sizes = {"num_rollouts": 512, "batch_size": 128, "maxlen_prompt": 1024, "maxlen_res": 512, "plan_gpu": "h100"}
    config = ppo_config(**paths | sizes | changes)
    models, rewards = models_of(config)
    trained = {name: replace(model.work, captured=True) for name, model in models.items()}
    return {phase.name: phase for phase in phases(config, gpus, trained, [m.work for m in rewards], 8, 1.0)}


def test_exchange_of_eight_nodes_is_that_worked_out_by_hand(paths_7b):  # noqa: F811
    """512 texts on 64 H100s: eight per GPU in one micro-batch, four optimizer steps of two texts per GPU.

    The ports of a node carry 400 GB/s, less than the 450 GB/s of NVLink. FLOPs: half of those in `test_plan.py`.
    """
    h100 = found(paths_7b)
    sent = {"prompts": 0, "new tokens": 0, "scoring": BOTH, "update": 4 * 3 * BOTH}  # an all-reduce is two
    assert {name: phase.sent for name, phase in h100.items()} == pytest.approx(sent, rel=1e-6)
    products = 4 * 4.3537e14 / 2 / (0.56 * 989e12)
    adam = 4 * 30 * 13.346e9 / 64 / (0.85 * 3.35e12)
    gathered = 4 * BOTH / (0.75 * 400e9)
    assert h100["update"].seconds == pytest.approx(products + gathered + adam, rel=1e-3)
    assert h100["update"].bound == "matrix products"

    slow = found(paths_7b, plan_network=200)  # 25 GB/s: one port of a node
    scored, updated = BOTH / (0.75 * 25e9), 4 * 3 * BOTH / (0.75 * 25e9) + adam
    assert [slow[name].seconds for name in ("scoring", "update")] == pytest.approx([scored, updated], rel=1e-4)
    assert {slow[name].bound for name in ("scoring", "update")} == {"exchange between nodes"}
    assert found(paths_7b, 8, plan_network=200) == found(paths_7b, 8)
    assert found(paths_7b, plan_network=1e5)["update"].seconds == pytest.approx(
        products + adam + gathered * 400 / 450, rel=1e-3
    )


def test_zero_3_gathers_weights_for_generation_once_or_for_each_token(paths_7b):  # noqa: F811
    whole = 2 * POLICY_7B * 63 / 64
    always = found(paths_7b, zero_stage=3, gather_for_generation="always")
    never = found(paths_7b, zero_stage=3, gather_for_generation="never")
    once = found(paths_7b)["prompts"].seconds + whole / (0.75 * 400e9)
    assert (always["prompts"].seconds, always["prompts"].sent) == pytest.approx((once, whole))
    assert always["new tokens"] == found(paths_7b)["new tokens"]
    per_token = never["new tokens"]
    assert (per_token.seconds, per_token.sent) == pytest.approx((512 * whole / (0.75 * 400e9), 512 * whole))
    assert per_token.bound == "exchange between nodes"
    assert never["update"].sent == pytest.approx(4 * 3 * BOTH)  # two gathers, one reduction


def test_weights_are_gathered_once_where_they_fit_one_and_a_half_times(paths_7b):  # noqa: F811
    sizes = {"num_rollouts": 512, "batch_size": 128, "maxlen_prompt": 1024, "zero_stage": 3}
    config = ppo_config(**paths_7b | sizes)
    never = replace(config, gather_for_generation="never")
    held = sum(map(min, fixed_rows(never, 64)[0].values()))
    for left, decided, gathered in [(3 * POLICY_7B, "always", 2 * POLICY_7B), (3 * POLICY_7B - 1, "never", 2 * 10**9)]:
        assert with_gathering(config, 64, held + left).gather_for_generation == decided
        other = replace(config, plan_gpu_memory=(held + left) / 2**30)
        assert plan(other, 64).rows["weights gathered from all GPUs"][0] == gathered
    assert with_gathering(never, 64, 1e15) is never


def test_slots_of_a_run_take_the_room_of_weights_that_it_cannot_gather(tmp_path):
    """A policy of 34B parameters, whose training takes more than 1 TB, does not fit into the host's memory."""
    sizes = {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 8, "num_key_value_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B | sizes))
    paths = {"policy_model_path": str(tmp_path), "critic_model_path": str(tmp_path), "dtype": "bf16"}
    sizes = {"num_rollouts": 64, "num_eval_prompts": 0, "rollout_batch_size": "auto"}
    config = ppo_config(**paths, **sizes, zero_stage=3)
    gathering = {name: replace(config, gather_for_generation=name) for name in ("auto", "always", "never")}
    free = moment_bytes([model.numels for model in models_of(config)[0].values()], config, 1) + 8 * 2**30
    slots = {name: measured_sizes(flags, tiny_models(), free).slots for name, flags in gathering.items()}
    assert slots == {"auto": 64, "always": 1, "never": 64}


def test_each_node_writes_its_share_of_a_checkpoint(paths_7b):  # noqa: F811
    config = ppo_config(**paths_7b, plan_gpu="h100")
    trained = {name: model.work for name, model in models_of(config)[0].items()}
    for gpus, nodes in [(1, 1), (8, 1), (9, 2), (64, 8)]:
        saved = checkpoint(config, gpus, trained)
        assert saved.seconds == pytest.approx(12 * (POLICY_7B + CRITIC_7B) / 2e9 / nodes)
    lines = table(config, 64, [Phase("scoring", 3.0, 2.0, "x", 16e9), Phase("update", 9.0, 4.0, "y")], saved)
    rows = [line.split(maxsplit=5) for line in lines.splitlines()[2:]]
    assert rows[0] == ["scoring", "3.00", "2.00", "16.0", "2.0", "x"]  # each GPU has an eighth of the node's traffic
    assert rows[2] == ["buffer", "12.00", "6.00", "16.0", "2.0"]
    assert rows[3][5] == "disk, 160 GB; the next update waits 7 s for it"
    assert table(config, 8, [Phase("update", 9.0, 4.0, "y", 8e9)], saved).splitlines()[2].split()[3:5] == ["8.0", "0.0"]
