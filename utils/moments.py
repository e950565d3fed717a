"""Running mean and standard deviation over all batches of all ranks. Pure."""

from collections.abc import Callable

import torch

from utils.tensors import identity


class RunningMoments:
    """Mean and sample standard deviation of a growing set of numbers (Chan et al. 1979, pairwise update).

    `mean`, `std` and `count` are Python numbers. `std` is 1 for fewer than two different numbers: safe to divide by.
    """

    def __init__(self):
        self.mean = 0.0
        self.count = 0
        self._squares = 0.0  # sum of squared deviations from the mean

    @property
    def std(self) -> float:
        """Returns the sample standard deviation (denominator n - 1)."""
        if self.count < 2:
            return 1.0
        std = (self._squares / (self.count - 1)) ** 0.5
        # Sums are float32, so equal numbers have a deviation of about 1e-7 of their mean.
        return std if std > 1e-6 * abs(self.mean) else 1.0

    def update(self, x: torch.Tensor, sum_ranks: Callable[[torch.Tensor], torch.Tensor] = identity) -> None:
        """Adds a batch of finite numbers, of any shape, possibly empty. sum_ranks: sums a tensor over ranks."""
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
        """Returns the state as JSON, for a checkpoint."""
        return {"mean": self.mean, "count": self.count, "squares": self._squares}

    def load_state_dict(self, state: dict) -> None:
        """Restores the state from a result of `state_dict`."""
        self.mean, self.count, self._squares = float(state["mean"]), int(state["count"]), float(state["squares"])
