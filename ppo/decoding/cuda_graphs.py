"""CUDA graphs of the decoding step: one launch in place of about 500, which take the host longer than the GPU.

A graph is bound to the number of its rows and to the addresses that it reads and writes: those of the decoder's and the
cache's own tensors, which stay where they are for a rollout.
"""

import warnings
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn


def bucket_of(rows: int, most: int) -> int:
    """The next larger of 1, 2, 4, 8, 16, 24, 32, ...; at most `most`: so many numbers of rows have graphs."""
    return min(most, 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8)


def is_capturable(decoder: nn.Module) -> bool:
    """Whether a step of this decoder may be a graph: its rotary embedding does not depend on the longest sequence.

    False with --deterministic: top-p sampling then copies from the host, which makes a capture fail.
    """
    depends = getattr(decoder.rotary_emb, "rope_type", "default") in ("dynamic", "longrope")
    return not (depends or torch.are_deterministic_algorithms_enabled())


class StepGraphs:
    """Graphs of one rollout's steps. They share memory, which is freed with this object."""

    failed: ClassVar[list] = []  # captures, of all rollouts; kept alive, as PyTorch's allocator refers to them

    def __init__(self):
        self.graphs: dict[int, tuple[Callable[[], None], torch.Tensor]] = {}
        self.warm: set[int] = set()
        self.pool = None

    def run(self, rows: int, step: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Runs step() on this number of rows, from the second time on as a graph. The output is valid until the next.

        The first time is a plain call, which compiles and loads kernels. step must not depend on anything that the host
        changes between calls. After a capture has failed, no more are made.
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
            # thread_local: what other threads, such as NCCL's, do on the GPU does not make the capture fail.
            captured = torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local")
            # The outer context makes this stream the current one again even where ending the capture fails.
            with torch.cuda.stream(torch.cuda.current_stream()), captured:
                output = step()
            self.graphs[rows] = graph.replay, output
        except RuntimeError as error:
            self.failed.append(graph)
            for generator in torch.cuda.default_generators:  # else they refuse to draw: to them the capture goes on
                generator.graphsafe_set_state(generator.clone_state())
            warnings.warn(f"decoding goes on without CUDA graphs, more slowly: {error}", stacklevel=2)
