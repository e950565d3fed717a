"""Assign the micro-batches of a global batch to ranks. Pure."""

from data.batching.collate import balance, micro_batches


def rank_plan(
    lengths: list[int], max_tokens: int, num_ranks: int, rank: int, joined: bool = False
) -> list[tuple[list[int], float]]:
    """Returns the micro-batches of `rank` as (indices, weight); all ranks have equally many, as ZeRO requires.

    lengths: of the whole global batch. Weights are 1, and each index occurs once over all ranks; a rank with fewer
    micro-batches ends with dummy ones, the shortest item with weight 0. joined: as in `micro_batches`.
    """
    plans = []
    for share in balance(lengths, num_ranks):
        parts = micro_batches([lengths[i] for i in share], max_tokens, num_ranks, joined)
        plans.append([[share[i] for i in part] for part in parts])
    idle = [min(range(len(lengths)), key=lengths.__getitem__)]
    missing = max(map(len, plans)) - len(plans[rank])
    return [(part, 1.0) for part in plans[rank]] + [(idle, 0.0)] * missing
