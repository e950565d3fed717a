"""Running mean and deviation of everything seen so far, on all ranks."""

from collections.abc import Callable

import torch

from utils.tensors import identity


class RunningMoments:
    """Mean and sample standard deviation of a growing set of numbers (Chan et al. 1979, pairwise update).

    `mean`, `std`, `count` are floats over all batches of all ranks. With fewer than two numbers, or equal ones,
    `std` is 1, so that dividing by it is safe.
    """

    def __init__(self):
        self.mean = 0.0
        self.count = 0
        self._squares = 0.0  # sum of squared distances to the mean

    @property
    def std(self) -> float:
        """Sample standard deviation (n - 1 below the line)."""
        if self.count < 2:
            return 1.0
        std = (self._squares / (self.count - 1)) ** 0.5
        # Sums are float32: of equal numbers the deviation is what rounding left, a ten-millionth of them.
        return std if std > 1e-6 * abs(self.mean) else 1.0

    def update(self, x: torch.Tensor, sum_ranks: Callable[[torch.Tensor], torch.Tensor] = identity) -> None:
        """Takes in a batch of any shape, finite; sum_ranks adds a tensor over ranks. An empty one changes nothing."""
        x = x.float()
        total, count = sum_ranks(torch.stack([x.sum(), torch.tensor(float(x.numel()), device=x.device)])).tolist()
        if count == 0:
            return
        batch_mean = total / count
        batch_squares = float(sum_ranks((x - batch_mean).square().sum()))
        distance = batch_mean - self.mean
        together = self.count + count
        self._squares += batch_squares + distance**2 * self.count * count / together
        self.mean += distance * count / together
        self.count = int(together)

    def state_dict(self) -> dict:
        """What a checkpoint has to keep."""
        return {"mean": self.mean, "count": self.count, "squares": self._squares}

    def load_state_dict(self, state: dict) -> None:
        """Goes on from what `state_dict` gave."""
        self.mean, self.count, self._squares = float(state["mean"]), int(state["count"]), float(state["squares"])
