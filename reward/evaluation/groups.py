"""Accuracies of reward models by group: the sections of RewardBench, and the strength of the preferences. Pure."""

from itertools import pairwise

from reward.metrics import ScoredItems, accuracy, accuracy_interval

# Subset -> its weight in its section (Lambert et al. 2024, arXiv 2403.13787): its number of pairs, but for math-prm,
# whose 447 pairs count as much as those of all six programming languages; and XSTest's two subsets have each other's
# numbers (the data has 154 to refuse, 250 to respond to), as in EXAMPLE_COUNTS of the benchmark's own code.
SECTIONS = {
    "Chat": {
        "alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28, "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 250,
        "xstest-should-respond": 154, "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164, "hep-python": 164,
        "hep-rust": 164,
    },
}  # fmt: skip
SUBSETS = {subset for section in SECTIONS.values() for subset in section}
BINS = 5  # groups of preferences by strength


def section_accuracies(accuracies: dict[str, float]) -> dict[str, float]:
    """Returns section -> weighted mean of its subsets that are there; {} unless all subsets are RewardBench's.

    RewardBench's score is the mean over sections. Version 1's fifth one, prior sets, is other data and left out.
    """
    if not accuracies or not accuracies.keys() <= SUBSETS:
        return {}
    found = {}
    for section, weights in SECTIONS.items():
        if there := weights.keys() & accuracies.keys():
            total = sum(weights[subset] for subset in there)
            found[section] = sum(weights[subset] * accuracies[subset] for subset in sorted(there)) / total
    return found


def by_strength(scored: ScoredItems, strengths: dict[int, float]) -> list[dict]:
    """Returns the accuracy in each fifth of the preferences, by the strength that `reward.strength` measured.

    strengths: `place` of an item -> its strength, as far as known. Below 0 the label is probably wrong (Part II §2).
    """
    known = sorted((item.place for item in scored.items if item.place in strengths), key=strengths.__getitem__)
    bounds = [round(k * len(known) / BINS) for k in range(BINS + 1)]
    groups = []
    for first, end in pairwise(bounds):
        if places := known[first:end]:
            chosen = set(places)
            part = scored.where(lambda item, chosen=chosen: item.place in chosen)
            groups.append({
                "low": strengths[places[0]], "high": strengths[places[-1]], "prompts": len(places),
                "accuracy": accuracy(part), "accuracy_interval": accuracy_interval(part),
            })  # fmt: skip
    return groups
