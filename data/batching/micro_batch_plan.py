"""Who does what in an optimizer step: a rank's micro-batches of the global batch. Pure."""

from data.batching.collate import balance, micro_batches


def rank_plan(
    lengths: list[int], max_tokens: int, num_ranks: int, rank: int, joined: bool = False
) -> list[tuple[list[int], float]]:
    """The micro-batches of `rank` as (indices, weight), as many on every rank, since ZeRO's collectives need that.

    Planned by each rank for all, from the lengths of the whole batch that all know. A rank with fewer repeats the
    shortest item with weight 0 at the end; all others have weight 1, and every index occurs once over the ranks.
    joined: as in `micro_batches`.
    """
    plans = []
    for share in balance(lengths, num_ranks):
        parts = micro_batches([lengths[i] for i in share], max_tokens, num_ranks, joined)
        plans.append([[share[i] for i in part] for part in parts])
    idle = [min(range(len(lengths)), key=lengths.__getitem__)]
    missing = max(map(len, plans)) - len(plans[rank])
    return [(part, 1.0) for part in plans[rank]] + [(idle, 0.0)] * missing
