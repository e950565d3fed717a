"""Process groups, training engines on top of DeepSpeed, and gathered weights.

A model under an engine is an `nn.Module` whose forward returns tensors. The caller divides its loss by the *global*
token count, so gradients are summed over micro-batches and ranks, never averaged.
"""

import contextlib
import datetime
import os
import socket
from collections.abc import Callable, Iterator

import deepspeed
import torch
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero import unwrap_model_for_generation
from torch import nn

from utils.deterministic import strictly
from utils.device import device
from utils.distributed import is_main, message_store, rank, world_size
from utils.engine.chunked_adamw import use_chunked_step
from utils.engine.memory import fits_whole
from utils.engine.offload import emptied, step_tensors
from utils.engine.settings import adds_up_in_place, deepspeed_config, trained_as
from utils.engine.state import SharedState, load_state, scale_weight, state_tensors
from utils.errors import UserError
from utils.files import first_names
from utils.flags.engine import EngineConfig
from utils.models.adapters import Adapted, trained_parameters
from utils.models.compile import layers_of
from utils.models.export import merged_tensors, saved_tensors, without_adapters
from utils.models.split import is_split, whole_shape

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# On Hopper and Blackwell PyTorch prefers cuDNN's attention, which plans for tens of milliseconds at each new length
# (PyTorch pull request 155958). Lengths of rows and of the cache differ in every call here.
torch.backends.cuda.enable_cudnn_sdp(False)
torch.set_float32_matmul_precision("highest")  # float32 products are float32, never TF32


def init_distributed(hang_timeout: float = 0.0) -> None:
    """Joins the process group (nccl on GPUs, gloo on CPUs); without a launcher, a group of this process only.

    hang_timeout: seconds, as --hang_timeout.
    """
    deepspeed.logger.setLevel("WARNING")
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT="0")  # 0: any free port
    if device().type == "cuda":
        gpus = torch.cuda.device_count()
        if gpus == 1 and os.environ.get("LOCAL_RANK", "0") == os.environ.get("SLURM_LOCALID"):
            os.environ["LOCAL_RANK"] = "0"  # Slurm shows each task a GPU of its own. DeepSpeed reads the variable, too
        if device().index >= gpus:
            what = f"local rank {device().index} has no GPU; this node has {gpus}"
            raise UserError(f"{what}. Start one process per GPU (NUM_GPUS)")
        torch.cuda.set_device(device())
    if not torch.distributed.is_initialized():
        if device().type == "cpu":
            # Without this DeepSpeed probes all its ops and builds its shared-memory all-reduce, which only inference
            # uses: a minute at first use, and 69 MB per rank that stay in /dev/shm.
            deepspeed.ops.__compatible_ops__ = {}
        backend = "nccl" if device().type == "cuda" else "gloo"
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=group_timeout(hang_timeout))
        if backend == "nccl" and world_size() > 1:
            _check_gpus()


def group_timeout(hang_timeout: float) -> datetime.timedelta:
    """Returns after what time process groups give up: twice --hang_timeout, so that the watchdog reports first."""
    return datetime.timedelta(seconds=2 * hang_timeout) if hang_timeout else datetime.timedelta(days=30)


def _check_gpus() -> None:
    """Raises UserError on all ranks if two of them use the same GPU.

    Ranks compare names in the store: NCCL's own error, at the first collective, does not say what to change.
    """
    store, name = message_store("GPUs"), torch.cuda.get_device_properties(device()).uuid
    store.set(str(rank()), f"{socket.gethostname()} {name}")
    used = [store.get(str(i)) for i in range(world_size())]
    if sharing := [i for i in range(world_size()) if used.count(used[i]) > 1]:
        who = f"ranks {first_names(list(map(str, sharing)))} share a GPU ({used[sharing[0]].decode()})"
        raise UserError(f"{who}; start one process per GPU (NUM_GPUS), or let each task of srun have one of its own")


def shutdown_distributed() -> None:
    """Leaves the process group, so that another run may follow in this process."""
    if torch.distributed.is_initialized():
        deepspeed.comm.destroy_process_group()


class _Trained(nn.Module):
    """What DeepSpeed sees of a model with adapters: the parameters that are trained, and the forward.

    It would cast the frozen ones to their dtype, send them to all ranks, and keep them in its lists.
    """

    def __init__(self, model: nn.Module, parameters: list[nn.Parameter]):
        super().__init__()
        self.model = (model,)  # a tuple, so that it is no submodule
        self.trained = nn.ParameterList(parameters)

    def forward(self, *args, **kwargs):
        return self.model[0](*args, **kwargs)


class TrainEngine:
    """One model with its optimizer.

    Call it for a forward and `backward` for each micro-batch's loss; then `measure`, and `apply` or `drop_gradients`.
    Memory per parameter: 2 bytes of bf16 weights (split over ranks under ZeRO-3), 12 bytes of float32 weights and Adam
    moments (split from stage 1 on), 2 bytes of gradients, or 4 with --grad_accum_dtype fp32 (split from stage 2 on).
    """

    def __init__(self, module: nn.Module, config: EngineConfig, name: str):
        """name: what metrics and errors call the model. The module's parameters are of config.dtype, on device().

        If it has an adapter, what requires gradients is float32, and DeepSpeed does not see the rest.
        """
        self.name = name
        self.module = module  # under ZeRO-3 its weights are whole only inside `gathered()`
        self.zero_stage = config.zero_stage
        self.gradient_clip = config.gradient_clip
        self.explosion_limit = config.explosion_limit
        self._norm: torch.Tensor | None = None  # of the gradients that `measure` saw
        self.before_change: Callable[[], None] = lambda: None  # called before what `state_tensors` returned changes
        self.version = 0  # counts changes of the weights
        self._bad_gradient = torch.zeros((), dtype=torch.bool, device=device())
        adapted = isinstance(module, Adapted) and bool(module.adapters)
        self.parameters = [*trained_parameters(module).values()]
        for parameter in self.parameters:
            # Norms: small, in every layer, and every gradient passes through one. Adapters are small, too.
            if adapted or len(whole_shape(parameter)) == 1:
                parameter.register_hook(self._note_gradient)
        if adapted:
            module, config = _Trained(module, self.parameters), trained_as(config)
        betas = (config.adam_beta1, config.adam_beta2)
        options = {"lr": 0.0, "betas": betas, "eps": config.adam_eps, "weight_decay": 0.0}
        if config.offload_optimizer:
            optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(self.parameters, **options)
        else:
            optimizer = torch.optim.AdamW(self.parameters, fused=True, **options)
        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=deepspeed_config(config), dist_init_required=False
        )
        self._optimizer = self.engine.optimizer  # DeepSpeed's; under stage 0 PyTorch's own
        if config.zero_stage == 2 and self._optimizer.overlap_comm:
            keep_while_reduced(self._optimizer)
        if config.zero_stage in (1, 2) and not config.offload_optimizer:
            use_chunked_step(self._optimizer)
            if adds_up_in_place(config):  # one rank holds the sum already: no copies into buckets and back
                self._optimizer.buffered_reduce_fallback = lambda *_, **__: None
        self._compute_norm = self._separate_norm_from_step()

    def __call__(self, *args, **kwargs):
        return self.engine(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of this rank's share of the loss. Undoes DeepSpeed's average over ranks."""
        with strictly():
            if isinstance(self.module, Adapted):
                self.module.activate()
            self.engine.backward(loss * world_size())

    def measure(self) -> float:
        """Sums the gradients over ranks and returns their global norm before clipping, equal on all ranks. Collective.

        Infinite if it is beyond --explosion_limit. `apply` or `drop_gradients` must follow.
        """
        self._reduce_gradients()
        self._norm = self._compute_norm()
        norm = float(self._norm)
        return norm if norm <= self.explosion_limit else float("inf")

    def apply(self, lr: float) -> None:
        """Makes an optimizer step with the gradients that `measure` found good, clipped by their norm. Collective."""
        self._change()
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if self.zero_stage == 0 and self.gradient_clip:
            nn.utils.clip_grads_with_norm_(self.parameters, self.gradient_clip, self._norm)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def drop_gradients(self) -> None:
        """Discards the gradients, measured or not; weights and optimizer state stay as they are. Collective."""
        self._norm = torch.tensor(float("inf"), device=device())
        if self.zero_stage:
            self._optimizer.step()  # DeepSpeed clears its gradient buffers and skips a step whose norm is infinite
            self._optimizer.averaged_gradients.clear()  # but with an offloaded optimizer it keeps the float32 sum
        self._optimizer.zero_grad()
        self._bad_gradient.zero_()

    def bad_gradient(self) -> bool:
        """Whether this rank's share of the last gradient was not finite. Resets."""
        bad = bool(self._bad_gradient)
        self._bad_gradient.zero_()
        return bad

    def _note_gradient(self, gradient: torch.Tensor) -> None:
        self._bad_gradient |= ~gradient.isfinite().all()

    def _reduce_gradients(self) -> None:
        """Does what DeepSpeed's `engine.step()` does before it calls the optimizer's step. Collective."""
        if self.zero_stage == 0:
            if world_size() > 1:
                self.engine.buffered_allreduce_fallback()
        elif self.engine.zero_optimization_partition_gradients():  # each backward has summed its own
            self._optimizer.finalize_gradient_accumulation_boundary()
        else:
            self._optimizer.set_gradient_accumulation_boundary(True)  # each backward sets it to False
            self._optimizer.reduce_gradients()

    def _separate_norm_from_step(self) -> Callable[[], torch.Tensor]:
        """Returns the function that computes the global norm; the optimizer's step then reads `_norm` instead.

        DeepSpeed computes the norm inside the step. That is too late to skip the step when the other model's gradient
        is bad.
        """
        optimizer = self._optimizer
        if self.zero_stage == 0:
            return lambda: nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.zero_stage < 3:
            compute, optimizer.scaled_global_norm = optimizer.scaled_global_norm, lambda *_: self._norm
            return compute
        groups, optimizer._get_norm_groups = optimizer._get_norm_groups, lambda: [self._norm]
        return lambda: combine_grad_norm_groups(groups())

    @contextlib.contextmanager
    def gathered(self):
        """Context in which every rank holds the whole weights and ZeRO-3's hooks are off. Collective."""
        if self.zero_stage < 3:
            yield self.module
        else:
            with unwrap_model_for_generation(self.engine):
                yield self.module

    def fits_gathered(self) -> bool:
        """Whether each rank has free memory for 1.5 times the whole weights. Collective."""
        return self.zero_stage < 3 or fits_whole(self.module)

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """Returns name -> whole tensor in host memory on rank 0, {} elsewhere. Collective."""
        held = {name: x.to("cpu", copy=True) for name, x in self.weights() if is_main()}
        return {name: held[name] for name in without_adapters(saved_tensors(self.module)) if name in held}

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (name, whole tensor on this rank's device) of what `full_state_dict` returns. Collective.

        Under ZeRO-3 these are copies, of one layer at a time. The caller must not change the others.
        """
        if isinstance(self.module, Adapted) and self.module.adapters:
            yield from merged_tensors(self.module)
            return
        tensors = saved_tensors(self.module)
        inside = [{id(x) for x in layer.parameters()} for layer in layers_of(self.module)]
        groups = [[name for name, x in tensors.items() if id(x) in ids] for ids in inside]
        in_layers = set().union(*groups)
        for names in [*groups, *([name] for name in tensors if name not in in_layers)]:
            split = [tensors[name] for name in names if is_split(tensors[name])]
            # DeepSpeed frees a gathered tensor, so that what is yielded has to be a copy.
            with deepspeed.zero.GatheredParameters(split) if split else contextlib.nullcontext():
                whole = [tensors[name].detach().clone() if split else tensors[name].detach() for name in names]
            yield from zip(names, whole, strict=True)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Returns what this rank must save for an exact resume; {} if another rank holds the same (stage 0).

        Not copied: only `apply`, `load_state` and `scale_weight` change it, after a call of `before_change`.
        """
        if self.zero_stage == 0 and not is_main():
            return {}
        return state_tensors(self.engine.optimizer, self.zero_stage, rank(), self.trained())

    def load_state(self, state: SharedState) -> None:
        """Restores what `state_tensors` of all ranks returned, for any number of ranks and any stage. Collective."""
        self._change()
        load_state(self.engine.optimizer, self.zero_stage, rank(), self.trained(), state)

    def scale_weight(self, name: str, factor: float) -> None:
        """Multiplies the trained parameter `name` by `factor`; the optimizer's moments do not change. Collective."""
        self._change()
        scale_weight(self.engine.optimizer, self.zero_stage, rank(), self.trained(), name, factor)

    @contextlib.contextmanager
    def states_offloaded(self):
        """Context in which host memory holds what only a step needs, 12 bytes per parameter. Forwards work as before.

        Before, it waits until a checkpoint that is being written has been read.
        """
        self.before_change()
        with emptied(step_tensors(self._optimizer, self.zero_stage, self.module.parameters())):
            yield

    def _change(self) -> None:
        self.before_change()
        self.version += 1

    def float32_weights(self) -> dict[str, torch.Tensor]:
        """Returns the float32 weights that this rank holds, as `weight/NAME/START`, not copied; all under stage 0."""
        held = state_tensors(self.engine.optimizer, self.zero_stage, rank(), self.trained())
        return {key: x for key, x in held.items() if key.startswith("weight/")}

    def trained(self) -> dict[nn.Parameter, str]:
        """Returns the trained parameters with their names, in the model's order."""
        return {parameter: name for name, parameter in trained_parameters(self.module).items()}


class InferenceEngine:
    """A model without optimizer, with the methods of TrainEngine that sampling and scoring use. One process."""

    zero_stage = 0
    version = 0

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def gathered(self):
        """Context in which the module is whole: it always is."""
        return contextlib.nullcontext(self.module)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (name, tensor), as `TrainEngine.weights` does."""
        return ((name, x.detach()) for name, x in saved_tensors(self.module).items())


def keep_while_reduced(optimizer) -> None:
    """Keeps the memory of large gradients, which ZeRO-2 frees at once, until DeepSpeed's stream has summed them."""
    average = optimizer.average_tensor

    def average_kept(gradient: torch.Tensor, *args):
        gradient.record_stream(optimizer.reduction_stream)
        average(gradient, *args)

    optimizer.average_tensor = average_kept
