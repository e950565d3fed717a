"""--deterministic: chooses kernels that give the same numbers in every run, and names operations that have none."""

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
NO_SUCH_FORM = re.compile(r"(\S+) does not have a deterministic implementation")


@contextlib.contextmanager
def repeatable(wanted: bool) -> Iterator[None]:
    """Context in which, if wanted, operations use deterministic kernels. Enter it before CUDA starts.

    An operation without such a kernel runs as usual, and rank 0 prints its name once.
    """
    if not wanted:
        yield
        return
    told: set[str] = set()

    def show(message, *where, **more) -> None:
        found = NO_SUCH_FORM.match(str(message))
        if not found:
            before(message, *where, **more)
        elif is_main() and found[1] not in told:
            told.add(found[1])
            what = f"{found[1]} has no deterministic form here; its numbers may differ from run to run"
            print(f"--deterministic: {what}", flush=True)

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    cudnn, filled = torch.backends.cudnn.deterministic, torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic = True
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads it, and filling costs time
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=NO_SUCH_FORM.pattern)
        before, warnings.showwarning = warnings.showwarning, show
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
            torch.backends.cudnn.deterministic = cudnn
            torch.utils.deterministic.fill_uninitialized_memory = filled


@contextlib.contextmanager
def strictly() -> Iterator[None]:
    """Context of a backward pass: attention is deterministic there only if nondeterministic operations raise errors.

    Does nothing outside `repeatable`. Raises UserError for an operation without a deterministic kernel.
    """
    if not torch.are_deterministic_algorithms_enabled():
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if not (found := NO_SUCH_FORM.search(str(error))):
            raise
        raise UserError(
            f"--deterministic: {found[1]}, in the backward pass of this model, has no deterministic form; leave the "
            "flag out, or try --attn_implementation eager"
        ) from error
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)
