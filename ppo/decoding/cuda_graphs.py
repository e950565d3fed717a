"""CUDA graphs of the decoding step: one launch in place of about 500, which take the host longer than the GPU.

A graph holds for one number of rows and for the addresses that it reads and writes: tensors of the decoder and the
cache, which are allocated once per rollout.
"""

import warnings
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn


def bucket_of(rows: int, most: int) -> int:
    """Rounds up to 1, 2, 4, 8, 16, 24, 32, ..., at most `most`. Only these numbers of rows have graphs."""
    return min(most, 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8)


def is_capturable(decoder: nn.Module) -> bool:
    """Whether a graph can hold a step of this decoder: its rotary embedding must not depend on lengths.

    False with --deterministic: top-p sampling then copies from the host, which a capture does not allow.
    """
    depends = getattr(decoder.rotary_emb, "rope_type", "default") in ("dynamic", "longrope")
    return not (depends or torch.are_deterministic_algorithms_enabled())


class StepGraphs:
    """Graphs of one rollout's steps. They share memory, which is freed with this object."""

    failed: ClassVar[list] = []  # captures of all rollouts; kept, because PyTorch's allocator refers to them

    def __init__(self):
        self.graphs: dict[int, tuple[Callable[[], None], torch.Tensor]] = {}
        self.warm: set[int] = set()
        self.pool = None

    def run(self, rows: int, step: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Runs step() on this number of rows and returns its output, which is valid until the next run.

        The first run per number of rows is a plain call, which compiles kernels; later ones replay a graph of step(),
        which must not depend on host variables that change. After a failed capture all runs are plain calls.
        """
        if rows in self.warm and rows not in self.graphs and not self.failed:
            self._capture(rows, step)
        self.warm.add(rows)
        if rows not in self.graphs:
            return step()
        replay, output = self.graphs[rows]
        replay()
        return output

    def _capture(self, rows: int, step: Callable[[], torch.Tensor]) -> None:
        """Captures the graph of step(), without running it."""
        graph = None
        try:
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # thread_local: GPU calls of other threads, such as NCCL's, do not make the capture fail.
            captured = torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local")
            # The outer context restores the current stream even if ending the capture fails.
            with torch.cuda.stream(torch.cuda.current_stream()), captured:
                output = step()
            self.graphs[rows] = graph.replay, output
        except RuntimeError as error:
            self.failed.append(graph)
            for generator in torch.cuda.default_generators:  # they would treat the capture as still active
                generator.graphsafe_set_state(generator.clone_state())
            warnings.warn(f"decoding continues without CUDA graphs, more slowly: {error}", stacklevel=2)
