"""The state of an engine in the files of all ranks that wrote it; reads any part of any parameter."""

from collections import defaultdict

import torch
from safetensors import safe_open


class SharedState:
    """Files whose tensors are named `KIND/PARAMETER/START`, each a part of a flat parameter, and `step`, a scalar.

    Reads only what is asked for. `moments`: the kinds besides `weight`; before the first step there are none, and
    `step` is None.
    """

    def __init__(self, paths: list[str]):
        self.step: torch.Tensor | None = None
        self._parts = defaultdict(list)  # (kind, parameter) -> [(start, end, slice of a file)]
        for path in paths:
            file = safe_open(path, "pt")
            for key in file.keys():  # noqa: SIM118 - not a dictionary
                if key == "step":
                    self.step = file.get_tensor(key)
                    continue
                kind, name, start = key.split("/")
                part = file.get_slice(key)
                self._parts[kind, name].append((int(start), int(start) + part.get_shape()[0], part))
        self.moments = sorted({kind for kind, _ in self._parts} - {"weight"})

    def check_sizes(self, sizes: dict[str, int]) -> None:
        """Raises KeyError if `sizes`, parameter name -> number of elements, are not those of the files."""
        weights = {name: found for (kind, name), found in self._parts.items() if kind == "weight"}
        for name in sizes | weights:
            held = sum(end - start for start, end, _ in weights.get(name, []))
            if held != sizes.get(name, 0):
                raise KeyError(f"{name} has {sizes.get(name, 0)} elements, not {held}")

    def read(self, kind: str, name: str, start: int, into: torch.Tensor) -> None:
        """Fills the flat tensor `into` with a parameter's elements from `start` on, as far as the files hold them."""
        for begin, end, part in self._parts[kind, name]:
            first, last = max(start, begin), min(start + len(into), end)
            if first < last:
                into[first - start : last - start] = part[first - begin : last - begin]
