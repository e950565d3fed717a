"""--deterministic: selects kernels with reproducible results, and prints operations without one."""

import contextlib
import os
import re
import warnings
from collections.abc import Iterator

import torch

from utils.distributed import is_main
from utils.errors import UserError

# Read by cuBLAS when CUDA starts, and by transformers' flash_attention_2.
ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}
NO_KERNEL = re.compile(r"(\S+) does not have a deterministic implementation")


@contextlib.contextmanager
def repeatable(wanted: bool) -> Iterator[None]:
    """Context in which, if wanted, operations use deterministic kernels. Enter it before CUDA starts.

    An operation without such a kernel runs as usual, and rank 0 prints its name once.
    """
    if not wanted:
        yield
        return
    printed: set[str] = set()

    def show(message, *where, **more) -> None:
        found = NO_KERNEL.match(str(message))
        if not found:
            before(message, *where, **more)
        elif is_main() and found[1] not in printed:
            printed.add(found[1])
            print(f"--deterministic: {found[1]} has no deterministic kernel; its results may vary", flush=True)

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    cudnn, filled = torch.backends.cudnn.deterministic, torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic = True
    torch.utils.deterministic.fill_uninitialized_memory = False  # no code reads such memory
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=NO_KERNEL.pattern)
        before, warnings.showwarning = warnings.showwarning, show
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
            torch.backends.cudnn.deterministic = cudnn
            torch.utils.deterministic.fill_uninitialized_memory = filled


@contextlib.contextmanager
def strictly() -> Iterator[None]:
    """Context of a deterministic backward pass in `repeatable`. UserError for an operation without such a kernel."""
    if not torch.are_deterministic_algorithms_enabled():
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if not (found := NO_KERNEL.search(str(error))):
            raise
        wrong = f"{found[1]}, in the backward pass of this model, has no deterministic kernel"
        raise UserError(f"--deterministic: {wrong}; leave the flag out, or pass --attn_implementation eager") from error
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)
