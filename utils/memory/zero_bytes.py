"""Memory of an engine per rank, in bytes, from the sizes of its parameters and the ZeRO stage.

numels: elements of each parameter tensor; element: bytes per element, 2 for bf16; gpus: number of ranks.
"""

from utils.engine.engine import DTYPES
from utils.engine.settings import BUCKET, PERSISTENT
from utils.flags.engine import EngineConfig

LIVE = 1_000_000_000  # parameters that ZeRO-3 gathers at once: DeepSpeed's stage3_max_live_parameters
FALLBACK_BUCKET = 500_000_000  # elements per reduction without ZeRO


def weight_bytes(numels: list[int], stage: int, gpus: int, element: int) -> int:
    """Returns bytes per rank. ZeRO-3 splits each tensor, and also keeps small ones whole."""
    if stage < 3:
        return element * sum(numels)
    whole = sum(n for n in numels if n <= PERSISTENT)
    return element * (sum(-(-n // gpus) for n in numels) + whole)


def gradient_bytes(numels: list[int], stage: int, gpus: int, element: int) -> int:
    """Returns bytes per rank between backward and step, split from stage 2. element: of the accumulation dtype."""
    return element * (sum(numels) if stage < 2 else sum(-(-n // gpus) for n in numels))


def optimizer_bytes(numels: list[int], stage: int, gpus: int) -> int:
    """Returns bytes per rank of Adam's two moments and, from stage 1, a float32 copy of the weights, all split."""
    return 8 * sum(numels) if stage == 0 else 12 * sum(-(-n // gpus) for n in numels)


def moment_bytes(models: list[list[int]], config: EngineConfig, gpus: int) -> int:
    """Returns bytes per rank of Adam's two moments of these models, which the first step allocates on the device."""
    share = 0 if config.offload_optimizer else 2 / 3 if config.zero_stage else 1
    return int(share * sum(optimizer_bytes(numels, config.zero_stage, gpus) for numels in models))


def backward_bytes(models: list[list[int]], config: EngineConfig, gpus: int) -> tuple[int, int, int]:
    """Returns bytes per rank in backward passes: (gradients, communication buckets, gathered weights)."""
    stage, element, largest = config.zero_stage, DTYPES[config.dtype].itemsize, max(map(sum, models))
    in_sum = 4 if config.adds_up_in_float32 else element
    # With one rank, bf16 gradients still go through buckets to a float32 sum.
    buckets = gpus > 1 or (stage == 2 and config.adds_up_in_float32)
    # One in ZeRO-1, two in ZeRO-2 (overlap) and ZeRO-3 (one per engine).
    bucket = (1 if stage == 1 else 2) * BUCKET if stage else min(largest, FALLBACK_BUCKET)
    return (
        sum(gradient_bytes(numels, stage, gpus, in_sum) for numels in models),
        element * bucket if buckets else 0,
        gathered_bytes(largest, element) if stage == 3 else 0,
    )


def gathered_bytes(numel: int, element: int) -> int:
    """Returns bytes of the weights that ZeRO-3 gathers at once in a forward or backward."""
    return element * min(LIVE, numel)
