"""Build the report of an evaluation as a dictionary for JSON, and render it as text."""

from dataclasses import asdict

import torch

from data.preferences import Preference
from reward import metrics
from reward.evaluation.groups import by_strength, section_accuracies
from reward.metrics import ScoredItems
from reward.win_rate import wilson_interval

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def model_report(scored: ScoredItems, strengths: dict[int, float]) -> dict:
    """Returns all metrics of one model on these comparisons. strengths: as of `by_strength`."""
    differences = scored.differences
    quantiles = torch.quantile(differences, torch.tensor(QUANTILES)).tolist()
    longer_better, longer_preferred = metrics.length_preference(scored)
    subsets = {name: subset_report(scored.of(name)) for name in scored.subsets}
    return {
        **{name: x for name, x in metrics.evaluation_metrics(scored).items() if not name.startswith("accuracy_")},
        "accuracy_interval": metrics.accuracy_interval(scored),
        "subsets": subsets,
        "rewardbench": section_accuracies({name: part["accuracy"] for name, part in subsets.items()}),
        "strength": by_strength(scored, strengths),
        "calibration": [asdict(b) for b in metrics.calibration(scored)],
        "score_difference_std": float(differences.std(correction=0)),
        "score_difference_quantiles": dict(zip(map(str, QUANTILES), quantiles, strict=True)),
        "longer_is_better": longer_better,
        "longer_is_preferred": longer_preferred,
    }


def subset_report(scored: ScoredItems) -> dict:
    """Returns the number of prompts, the accuracy and its 95 % interval."""
    interval = metrics.accuracy_interval(scored)
    return {"prompts": len(scored.items), "accuracy": metrics.accuracy(scored), "accuracy_interval": interval}


def evaluation_report(scored: dict[str, ScoredItems], data_path: str, preferences: list[Preference] = ()) -> dict:
    """Returns the report of all models, and with several models their agreement. scored: model name -> scores.

    preferences: at the `place` of each item, for their strengths.
    """
    first = next(iter(scored.values()))
    pairs = {place: preference.pairs for place, preference in enumerate(preferences)}
    strengths = {i: each[0].strength for i, each in pairs.items() if len(each) == 1 and each[0].strength is not None}
    report = {
        "data_path": data_path,
        "prompts": len(first.items),
        "pairs": len(first.differences),
        "models": {name: model_report(model, strengths) for name, model in scored.items()},
    }
    if len(scored) > 1:
        found, count = metrics.agreement(list(scored.values())), len(first.items)
        report["ensemble"] = found | {"accuracy_interval": wilson_interval(found["accuracy"] * count, count)[1:]}
    return report


def render(report: dict) -> str:
    """Returns the report as text."""
    lines = [f"{report['prompts']} prompts, {report['pairs']} pairs from {report['data_path']}; 95 % intervals"]
    for name, model in report["models"].items():
        lines += ["", name, f"  accuracy            {_share(model)}"]
        if len(model["subsets"]) > 1:
            lines += [f"    {key:18}{_share(part)}  of {part['prompts']}" for key, part in model["subsets"].items()]
        if sections := model["rewardbench"]:
            lines += ["  RewardBench's sections (weighted; a tie counts half)"]
            lines += [f"    {key:18}{x:.3f}" for key, x in sections.items()]
            lines += [f"    {'mean of sections':18}{sum(sections.values()) / len(sections):.3f}"]
        if model["strength"]:
            lines += ["  by strength of the preference"]
        for part in model["strength"]:
            lines += [f"    {part['low']:7.2f} to {part['high']:7.2f} {_share(part)}  of {part['prompts']}"]
        lines += [
            f"  loss                {model['loss']:.3f}  (random scores: 0.693)",
            f"  score difference    {model['score_difference']:.3f}, std {model['score_difference_std']:.3f}",
            f"  calibration error   {model['calibration_error']:.3f}",
            f"  length correlation  {model['length_correlation']:.3f}",
            f"  longer answer       labelled better in {model['longer_is_better']:.1%} of pairs, "
            f"scored higher in {model['longer_is_preferred']:.1%}",
        ]
    if ensemble := report.get("ensemble"):
        lines += [
            "",
            f"all {len(report['models'])} models",
            f"  accuracy of the mean difference  {_share(ensemble)}",
            f"  mean agreement of two models     {ensemble['pairwise']:.3f}",
            f"  unanimous                        {ensemble['unanimous']:.3f}",
            f"  std of a pair's difference       {ensemble['strength_std']:.3f}",
        ]
    return "\n".join(lines)


def _share(part: dict) -> str:
    low, high = part["accuracy_interval"]
    return f"{part['accuracy']:.3f} [{low:.3f}, {high:.3f}]"
