"""An engine's state in the files of all ranks that wrote it: any stretch of any parameter, read where it lies."""

from collections import defaultdict

import torch
from safetensors import safe_open


class SharedState:
    """Files whose tensors are named `KIND/PARAMETER/START`, each a stretch of a flat parameter, and `step`.

    Only what is asked for is read. `moments`: the kinds besides `weight`, none when no step had been made; then `step`,
    else a scalar, is None.
    """

    def __init__(self, paths: list[str]):
        self.step: torch.Tensor | None = None
        self._stretches = defaultdict(list)  # (kind, parameter) -> [(start, end, slice of a file)]
        for path in paths:
            file = safe_open(path, "pt")
            for key in file.keys():  # noqa: SIM118 - it is no dictionary
                if key == "step":
                    self.step = file.get_tensor(key)
                    continue
                kind, name, start = key.split("/")
                stretch = file.get_slice(key)
                self._stretches[kind, name].append((int(start), int(start) + stretch.get_shape()[0], stretch))
        self.moments = sorted({kind for kind, _ in self._stretches} - {"weight"})

    def check_sizes(self, sizes: dict[str, int]) -> None:
        """Raises KeyError where the parameters, name -> elements, are not those of the files."""
        weights = {name: found for (kind, name), found in self._stretches.items() if kind == "weight"}
        for name in sizes | weights:
            held = sum(end - start for start, end, _ in weights.get(name, []))
            if held != sizes.get(name, 0):
                raise KeyError(f"{name} has {sizes.get(name, 0)} elements, not {held}")

    def read(self, kind: str, name: str, start: int, into: torch.Tensor) -> None:
        """Fills `into`, flat, with a parameter's elements from `start` on, as far as the files hold them."""
        for begin, end, stretch in self._stretches[kind, name]:
            first, last = max(start, begin), min(start + len(into), end)
            if first < last:
                into[first - start : last - start] = stretch[first - begin : last - begin]
