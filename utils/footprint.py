"""What an engine holds on a rank, in bytes, from the sizes of its parameters: the arithmetic of the ZeRO stages.

numels: elements of each parameter tensor; element: bytes of one, 2 for bf16; gpus: ranks that share the work.
"""

from utils.engine import BUCKET, PERSISTENT

LIVE = 1_000_000_000  # parameters that ZeRO-3 holds whole at once: DeepSpeed's stage3_max_live_parameters
FALLBACK_BUCKET = 500_000_000  # elements that DeepSpeed reduces at once without ZeRO


def weight_bytes(numels: list[int], stage: int, gpus: int, element: int) -> int:
    """Of a rank. ZeRO-3 splits each tensor, and keeps small ones whole too."""
    if stage < 3:
        return element * sum(numels)
    whole = sum(n for n in numels if n <= PERSISTENT)
    return element * (sum(-(-n // gpus) for n in numels) + whole)


def gradient_bytes(numels: list[int], stage: int, gpus: int, element: int) -> int:
    """Of a rank, between backward and step: split from stage 2 on. element: of the dtype that they add up in."""
    return element * (sum(numels) if stage < 2 else sum(-(-n // gpus) for n in numels))


def optimizer_bytes(numels: list[int], stage: int, gpus: int) -> int:
    """Of a rank: Adam's two moments, and from stage 1 on a float32 copy of the weights, all split."""
    return 8 * sum(numels) if stage == 0 else 12 * sum(-(-n // gpus) for n in numels)


def bucket_bytes(stage: int, numel: int, element: int) -> int:
    """What gradients are reduced in: two buckets where communication overlaps, one an engine under ZeRO-3."""
    if stage == 0:
        return element * min(numel, FALLBACK_BUCKET)
    return element * BUCKET * (1 if stage == 1 else 2)


def gathered_bytes(numel: int, element: int) -> int:
    """Weights that ZeRO-3 holds whole at once in a forward or backward."""
    return element * min(LIVE, numel)
