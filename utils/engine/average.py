"""An exponential moving average of a trained model's weights, of which each rank holds a share in float32."""

from collections.abc import Callable, Iterator

import deepspeed
import torch
from torch import nn

from utils.device import device
from utils.distributed import gather_objects, rank, sum_ranks, world_size
from utils.engine.engine import TrainEngine
from utils.engine.state import SharedState
from utils.models.split import is_split, whole_shape


class WeightAverage:
    """The average, in the pieces in which the engine's ranks hold float32 weights: 4 bytes per parameter in all.

    Without ZeRO every rank holds all of it. Checkpoints contain it as they contain an engine's weights.
    """

    def __init__(self, engine: TrainEngine):
        self.engine = engine
        self.before_change: Callable[[], None] = lambda: None  # called before what `state_tensors` returned changes
        self.load_state(None)

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Sets the average to decay · average + (1 - decay) · weights."""
        self.before_change()
        for key, x in self.engine.float32_weights().items():
            self._pieces[key].lerp_(x, 1.0 - decay)

    def whole(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (name, whole tensor on this rank's device) of each trained parameter, in the model's order.

        Collective.
        """
        held: dict[str, list[tuple[int, torch.Tensor]]] = {}
        for key, x in self._pieces.items():
            _, name, start = key.split("/")
            held.setdefault(name, []).append((int(start), x))
        for parameter, name in self.engine.trained().items():
            shape = whole_shape(parameter)
            flat = torch.zeros(shape.numel(), dtype=dtype, device=device())
            for start, x in held.get(name, []):
                flat[start : start + len(x)] = x
            if self.engine.zero_stage and world_size() > 1:
                flat = sum_ranks(flat)  # one rank's value and zeros: exact
            yield name, flat.view(shape)

    @torch.no_grad()
    def write_to(self, model: nn.Module) -> None:
        """Copies the average into a frozen model with the same parameters, split over the ranks or not. Collective."""
        targets = list(model.parameters())
        for target, (_, x) in zip(targets, self.whole(targets[0].dtype), strict=True):
            # Not the shares alone: of small parameters every rank keeps a whole copy, which DeepSpeed renews here.
            with deepspeed.zero.GatheredParameters(target, modifier_rank=0, enabled=is_split(target)):
                target.copy_(x)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Returns what this rank must save, as `TrainEngine.state_tensors`."""
        return self._pieces if self.engine.zero_stage or rank() == 0 else {}

    @torch.no_grad()
    def load_state(self, state: SharedState | None) -> None:
        """Restores what `state_tensors` of all ranks returned; None: the average starts at the engine's weights.

        Raises KeyError for another model's, ValueError on all ranks if a number is not finite. Collective.
        """
        self.before_change()
        self._pieces = {key: x.clone() for key, x in self.engine.float32_weights().items()}
        if state is None:
            return
        state.check_sizes({name: whole_shape(p).numel() for p, name in self.engine.trained().items()})
        for key, x in self._pieces.items():
            _, name, start = key.split("/")
            state.read("weight", name, int(start), x)
        sound = all(bool(x.isfinite().all()) for x in self._pieces.values())
        if not all(gather_objects(sound)):
            raise ValueError("it has weights that are not finite")
