"""DeepSpeed, in one file: process groups, a training engine a model, frozen models, gathered weights.

Nothing else imports deepspeed. Every model under an engine is an `nn.Module` whose forward returns tensors; the
caller makes a loss that is already divided by the *global* token count, so gradients are summed over micro-batches and
ranks, never averaged.
"""

import contextlib
import datetime
import os
from collections.abc import Callable
from copy import copy

import torch

from utils.device import device, on_gpu

if not on_gpu():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # deepspeed probes for accelerators when it is imported

import deepspeed
from deepspeed.runtime.zero import unwrap_model_for_generation
from torch import nn

from utils.deterministic import strictly
from utils.distributed import any_rank, is_main, max_ranks, rank, ranks_where, world_size
from utils.engine.build_lock import unblocked_builds
from utils.engine.chunked_adamw import use_chunked_step
from utils.engine.host_copies import host_copies
from utils.engine.host_memory import free_host_memory
from utils.engine.sharded_files import SharedState
from utils.engine.state import load_state, scale_weight, state_tensors
from utils.errors import UserError
from utils.flags.engine import EngineConfig
from utils.models.compile import layers_of
from utils.models.export import saved_tensors

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# On Hopper and Blackwell attention would go through cuDNN first, which plans anew for each length that it meets, for
# tens of milliseconds (pytorch pull request 155958): lengths of rows and of the cache are never the same here.
torch.backends.cuda.enable_cudnn_sdp(False)
torch.set_float32_matmul_precision("highest")  # float32 products are float32, never TF32

PERSISTENT = 10_000  # elements up to which ZeRO-3 leaves a tensor whole on every rank: norms, not matrices
BUCKET = 50_000_000  # elements a gradient bucket holds: 100 MB in bf16, a few of them an engine; a tenth on the CPU

ROOM = 0.9  # share of a card that plans and automatic sizes may take


def init_distributed(hang_timeout: float = 0.0) -> None:
    """Joins the process group (nccl on GPUs, gloo on CPUs); without a launcher, a group of this process alone.

    hang_timeout: seconds, as in --hang_timeout; the group itself gives up later, so that the watchdog speaks first.
    """
    deepspeed.logger.setLevel("WARNING")
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
        )  # any free one
    if device().type == "cuda":
        gpus = torch.cuda.device_count()
        if device().index >= gpus:
            raise UserError(
                f"local rank {device().index} has no GPU, there are {gpus}: start as many processes as GPUs (NUM_GPUS)"
            )
        torch.cuda.set_device(device())
    if not torch.distributed.is_initialized():
        if device().type == "cpu":
            # An empty table of ops: DeepSpeed probes for all of them otherwise, and builds its shared-memory reduction,
            # which inference alone would use: a minute at first use, and 69 MB a rank that stay in /dev/shm.
            deepspeed.ops.__compatible_ops__ = {}
        patience = datetime.timedelta(seconds=2 * hang_timeout) if hang_timeout else datetime.timedelta(days=30)
        backend = "nccl" if device().type == "cuda" else "gloo"
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=patience)


def shutdown_distributed() -> None:
    """Leaves the process group, so that a finished run ends without warnings and another may follow in this process."""
    if torch.distributed.is_initialized():
        deepspeed.comm.destroy_process_group()


def deepspeed_config(config: EngineConfig, offload_weights: bool = False) -> dict:
    """The DeepSpeed JSON for our flags. Accumulation is ours (`managed_gradient_accumulation` off): step() is the
    boundary, and the number of micro-batches may change from step to step."""
    bucket = BUCKET if device().type == "cuda" else BUCKET // 10
    zero = {"stage": config.zero_stage, "contiguous_gradients": True, "reduce_bucket_size": bucket}
    if adds_up_in_place(config):
        # Nothing to split: without stage 2's hooks gradients add up where autograd leaves them, not in copies.
        zero |= {"stage": 1, "contiguous_gradients": False}
    zero["overlap_comm"] = zero["stage"] >= 2 and device().type == "cuda"
    if config.zero_stage == 3:
        zero |= {"stage3_prefetch_bucket_size": bucket, "stage3_param_persistence_threshold": PERSISTENT}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device().type == "cuda"}
    if offload_weights:
        zero["offload_param"] = {"device": "cpu"}  # page-locked by `shard_frozen`, in less memory than DeepSpeed takes
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.gradient_clip if config.zero_stage else 0.0,
        "zero_optimization": zero,
        "bf16": {"enabled": config.dtype == "bf16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32" if config.adds_up_in_float32 else config.dtype},
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU at every forward and step
    }


def adds_up_in_place(config: EngineConfig) -> bool:
    """Whether ZeRO-1 or 2 leaves gradients in `parameter.grad`: one rank, no copy on the host or in float32."""
    alone = config.zero_stage in (1, 2) and world_size() == 1
    return alone and not (config.offload_optimizer or config.adds_up_in_float32)


class TrainEngine:
    """One model with its optimizer. Call it for a forward, `backward` a loss per micro-batch, `step` once.

    Holds per parameter: 2 bytes of bf16 weights (under ZeRO-3 split over ranks), and split over ranks from stage 1 on
    12 bytes of float32 weight and Adam moments; gradients 2 bytes, split from stage 2 on. They add up in bf16, so very
    many micro-batches a step cost some precision, or with --grad_accum_dtype fp32 in float32: 4 bytes.
    """

    def __init__(self, module: nn.Module, config: EngineConfig, name: str):
        """name: what error messages call the model. The module's parameters are of config.dtype, on device()."""
        self.name = name
        self.zero_stage = config.zero_stage
        self.gradient_clip = config.gradient_clip
        self.explosion_limit = config.explosion_limit
        self._replicated_norm = None
        self._provided: Callable[[], bool] | None = None
        self._refusal: bool | None = None  # of the step at hand, once it is known
        self._bad_gradient = torch.zeros((), dtype=torch.bool, device=device())
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        for parameter in self.parameters:
            if parameter.dim() == 1:  # norms: small, in every layer, and all that flows back passes one
                parameter.register_hook(self._note_gradient)
        betas = (config.adam_beta1, config.adam_beta2)
        options = {"lr": 0.0, "betas": betas, "eps": config.adam_eps, "weight_decay": 0.0}
        if config.offload_optimizer:
            with unblocked_builds():
                optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(self.parameters, **options)
        else:
            optimizer = torch.optim.AdamW(self.parameters, fused=True, **options)
        if config.zero_stage == 0:  # DeepSpeed neither reports the norm nor checks it there
            optimizer.register_step_pre_hook(self._clip_replicated)
        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=deepspeed_config(config), dist_init_required=False
        )
        if config.zero_stage:
            self._veto_steps()
        if config.zero_stage == 2 and self.engine.optimizer.overlap_comm:
            keep_while_reduced(self.engine.optimizer)
        if config.zero_stage in (1, 2) and not config.offload_optimizer:
            use_chunked_step(self.engine.optimizer)
            if adds_up_in_place(config):  # what one rank holds is the sum already: no copies into buckets and back
                self.engine.optimizer.buffered_reduce_fallback = lambda *_, **__: None
        elif config.zero_stage == 0 and world_size() == 1:
            self.engine.buffered_allreduce_fallback = lambda *_, **__: None

    @property
    def module(self) -> nn.Module:
        """The model inside the engine. Under ZeRO-3 its weights are whole only inside `gathered()`."""
        return self.engine.module

    def __call__(self, *args, **kwargs):
        return self.engine(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of this rank's share of the loss. DeepSpeed averages over ranks: undone here."""
        with strictly():
            self.engine.backward(loss * world_size())

    def step(self, lr: float, provided: Callable[[], bool] | None = None) -> float:
        """One optimizer step at this learning rate; returns the global gradient norm before clipping.

        Infinite, on all ranks, where the norm is not finite or beyond --explosion_limit: then the gradients are gone,
        and weights and optimizer state are as they were. So they are where `provided` says no, which is asked once
        the norm is known to be good: DeepSpeed tells it only in the middle of a step.
        """
        self._provided, self._refusal = provided, None
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        if not self.engine.was_step_applied():
            if self.zero_stage in (1, 2):  # with an offloaded optimizer DeepSpeed keeps the float32 sum of this step
                self.engine.optimizer.averaged_gradients.clear()
            return float("inf")
        return float(self.engine.get_global_grad_norm() if self.zero_stage else self._replicated_norm)

    def drop_gradients(self) -> None:
        """Forgets what `backward` has added up. Collective."""
        self.step(0.0, lambda: False)
        self._bad_gradient.zero_()

    def bad_gradients(self) -> str:
        """`ranks_where` the rank's own share of the last gradient was not finite. Once. Collective."""
        return ranks_where(self.bad_gradient())

    def bad_gradient(self) -> bool:
        """Whether this rank's was not. Once."""
        bad = bool(self._bad_gradient)
        self._bad_gradient.zero_()
        return bad

    def _note_gradient(self, gradient: torch.Tensor) -> None:
        self._bad_gradient |= ~gradient.isfinite().all()

    def _refused(self, norm: float) -> bool:
        if self._refusal is None:  # once a step, however often DeepSpeed should want the norm
            bad = not norm <= self.explosion_limit
            self._refusal = bad or (self._provided is not None and not self._provided())
        return self._refusal

    def _clip_replicated(self, optimizer: torch.optim.Optimizer, args, kwargs) -> None:
        limit = self.gradient_clip or float("inf")
        self._replicated_norm = nn.utils.clip_grad_norm_(self.parameters, limit)
        if self._refused(float(self._replicated_norm)):
            self._replicated_norm = float("inf")
            self.engine.zero_grad()  # a parameter without a gradient is passed over

    def _veto_steps(self) -> None:
        """DeepSpeed drops the gradients of a step whose norm is infinite: that is what it gets to see of a bad one."""
        optimizer = self.engine.optimizer
        name = "_get_norm_groups" if self.zero_stage == 3 else "scaled_global_norm"
        measure = getattr(optimizer, name)

        def norms(*args, **kwargs):
            found = measure(*args, **kwargs)
            groups = torch.stack([torch.as_tensor(x).float() for x in (found if self.zero_stage == 3 else [found])])
            bad = bool((groups < 0).any()) or self._refused(float(groups.norm()))  # DeepSpeed writes -1 for a NaN
            infinite = groups.new_tensor(float("inf"))
            return found if not bad else [infinite] if self.zero_stage == 3 else infinite

        setattr(optimizer, name, norms)

    @contextlib.contextmanager
    def gathered(self):
        """Inside, every rank holds the whole weights and the module runs without ZeRO-3's hooks. Collective."""
        if self.zero_stage < 3:
            yield self.module
        else:
            with unwrap_model_for_generation(self.engine):
                yield self.module

    def fits_gathered(self) -> bool:
        """True when each rank has room for the whole weights once more, and half as much to work in. Collective."""
        if self.zero_stage < 3:
            return True
        element = torch.finfo(next(self.module.parameters()).dtype).bits // 8
        needed = 1.5 * element * sum(getattr(p, "ds_numel", p.numel()) for p in self.module.parameters())
        return not any_rank(needed > free_memory(), device())

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """Name -> whole tensor in host memory on rank 0, {} elsewhere; under ZeRO-3 gathered one by one. Collective."""
        state = {}
        for name, tensor in saved_tensors(self.module).items():
            with whole_parameter(tensor):
                if is_main():
                    state[name] = tensor.detach().to("cpu", copy=True)
        return state

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """What this rank has to keep for an exact resume; {} where another rank holds the same (stage 0)."""
        if self.zero_stage == 0 and not is_main():
            return {}
        return state_tensors(self.engine.optimizer, self.zero_stage, rank(), self._trained())

    def load_state(self, state: SharedState) -> None:
        """Goes on from what `state_tensors` of all ranks gave, on however many and in any stage. Collective."""
        load_state(self.engine.optimizer, self.zero_stage, rank(), self._trained(), state)

    def scale_weight(self, name: str, factor: float) -> None:
        """Multiplies the trained parameter `name` by `factor`; the optimizer's moments stay. Collective."""
        scale_weight(self.engine.optimizer, self.zero_stage, rank(), self._trained(), name, factor)

    def _trained(self) -> dict[nn.Parameter, str]:
        return {parameter: name for name, parameter in self.module.named_parameters() if parameter.requires_grad}


class InferenceEngine:
    """A model without optimizer behind the part of TrainEngine's face that sampling and scoring use. One process."""

    zero_stage = 0

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def gathered(self):
        """The module is always whole."""
        return contextlib.nullcontext(self.module)


def keep_while_reduced(optimizer) -> None:
    """Keeps the memory of gradients larger than BUCKET until the stream that sums them over ranks is done with them.

    DeepSpeed's ZeRO-2 works on those where they lie, in a stream of its own, and drops them at once on ranks that own
    nothing of them: PyTorch would give their memory to the backward pass.
    """
    average = optimizer.average_tensor

    def average_kept(gradient: torch.Tensor, *args):
        gradient.record_stream(optimizer.reduction_stream)
        average(gradient, *args)

    optimizer.average_tensor = average_kept


def whole_parameter(parameter: torch.Tensor):
    """Context in which a parameter that ZeRO-3 has split is whole on every rank; buffers always are."""
    if hasattr(parameter, "ds_id"):
        return deepspeed.zero.GatheredParameters([parameter])
    return contextlib.nullcontext()


def free_memory() -> int:
    """Bytes that this process may still take on its device: of its GPU, else of host memory."""
    if device().type == "cuda":
        # What PyTorch's allocator keeps for itself is free to us too.
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return free_host_memory()


def splits_frozen(zero_stage: int, ranks: int) -> bool:
    """Whether the weights of frozen models are split: under ZeRO-3, and with several ranks under ZeRO-1 and 2 too."""
    return zero_stage == 3 or (zero_stage > 0 and ranks > 1)


def device_room() -> int | None:
    """Bytes that each rank may still take on its GPU: ROOM of its memory less what is in use, the least over ranks.

    None on a CPU. Collective.
    """
    if device().type == "cpu":
        return None
    spare = free_memory() - int((1 - ROOM) * torch.cuda.mem_get_info()[1])
    return -max_ranks(-spare, device())


def shard_frozen(module: nn.Module, config: EngineConfig, offload: bool = False) -> nn.Module:
    """Prepares a model for scoring alone; where `splits_frozen`, its weights are split over the ranks.

    It has no optimizer state and no gradients. A split model gathers its weights layer by layer in each forward, so
    all ranks must call it equally often. offload: its shards stay in host memory; a model that is not split stays
    where it is.
    """
    module.requires_grad_(False).eval()
    if not splits_frozen(config.zero_stage, world_size()):
        return module
    flags = copy(config)
    flags.zero_stage, flags.offload_optimizer = 3, False
    settings = deepspeed_config(flags, offload_weights=offload)
    # It replaces torch.nn.functional.linear in the whole process, which only training under ZeRO-3 gains from.
    settings["zero_optimization"]["memory_efficient_linear"] = config.zero_stage == 3
    layers = layers_of(module)
    for layer in layers:  # gathered as a whole: which experts are called inside depends on a rank's tokens
        deepspeed.utils.set_z3_leaf_module(layer, True)
    next_layer = max((sum(p.numel() for p in layer.parameters()) for layer in layers), default=BUCKET)
    settings["zero_optimization"]["stage3_prefetch_bucket_size"] = next_layer
    sharded, *_ = deepspeed.initialize(model=module, config=settings, dist_init_required=False)
    if offload:
        shards = [parameter.ds_tensor for parameter in module.parameters()]
        for shard, held in zip(shards, host_copies(shards), strict=True):
            shard.data = held
    return sharded
