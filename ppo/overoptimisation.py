"""Over-optimisation of a PPO run: `python -m ppo.compare --checkpoints RUN --heldout_reward_model_path R [...]`.

Every policy that the run has kept answers the same prompts with the same random streams. The score that it was trained
on (proxy) and held-out scores, in standard deviations of the first policy's, are set against sqrt(KL), as in Gao et al.
2023 (https://arxiv.org/abs/2210.10760). 95 % intervals: bootstrap over prompts.
"""

import math
import os

from ppo.overoptimisation_flags import CheckpointsConfig, read_flags


def main(argv: list[str]) -> None:
    """Prints the table and what follows from it; JSON and a picture go to --output. Raises UserError."""
    config, saved = read_flags(argv)
    from ppo.overoptimisation_plot import draw_overoptimisation
    from ppo.overoptimisation_scores import score_policies
    from reward.evaluation.plots import check_plots
    from utils.files import atomic_file, check_output_file, is_special, write_json

    picture = None
    if config.output:
        check_output_file(config.output, "--output")
        if not is_special(config.output):
            picture = f"{os.path.splitext(config.output)[0]}.png"
            check_output_file(picture, "--output")
            check_plots()
    report = overoptimisation(*score_policies(config, saved), config)
    print(render(report))
    if config.output:
        write_json(config.output, finite(report), "--output")
        if picture:
            with atomic_file(picture, "--output") as file:
                file.buffer.write(draw_overoptimisation(report))
        print(f"written to {config.output}" + f" and {picture}" * bool(picture))


def overoptimisation(kept: list, columns: dict, scores: dict, config: CheckpointsConfig) -> dict:
    """Returns the report, for JSON. scores: judge -> [policies, prompts], the proxy first; columns: kl and length."""
    import torch

    from ppo import overoptimisation_fit as found

    d = found.distance(columns["kl"], config.seed)
    gains = {judge: found.standardised(x, config.seed) for judge, x in scores.items()}
    heldout = torch.stack([x for judge, x in gains.items() if judge != "proxy"]).mean(0)
    order = [i for i, one in enumerate(kept) if one.step is not None]
    taken, best = found.to_take(heldout, d)
    parted, fits = found.parting(gains["proxy"], heldout, order), {}
    for judge, gain in {"proxy": gains["proxy"], "held out": heldout}.items():
        alpha, beta = found.fit(d[order], gain[order])
        shape = {"alpha": alpha, "beta": beta, "peak": found.peak(alpha, beta)}
        if len(order) > 3:
            fits[judge] = {name: found.interval(x) for name, x in shape.items()}
    if parted:
        parted |= {name: kept[parted[name]].name for name in ("policy", "since")}
    kl = found.resampled_mean(columns["kl"], config.seed)
    policies = [
        {
            "name": one.name, "step": one.step, "kl": found.interval(kl[i]), "sqrt_kl": found.interval(d[i]),
            "length": float(columns["length"][i].mean()),
            "scores": {judge: float(x[i].mean()) for judge, x in scores.items()},
            "gains": {judge: found.interval(x[i]) for judge, x in gains.items()},
            "held out": found.interval(heldout[i]),
        }
        for i, one in enumerate(kept)
    ]  # fmt: skip
    return {
        "run": config.checkpoints, "prompts": columns["kl"].shape[1], "temperature": config.temperature,
        "proxy": config.reward_paths + config.reward_fn, "heldout": [judge for judge in scores if judge != "proxy"],
        "policies": policies, "fit": fits, "parting": parted, "take": kept[taken].name,
        "highest_heldout": kept[best].name,
    }  # fmt: skip


def finite(value):
    """Returns a report with None for numbers that are not finite, which JSON has no words for."""
    if isinstance(value, dict):
        return {key: finite(x) for key, x in value.items()}
    if isinstance(value, list):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render(report: dict) -> str:
    """Returns the report as text."""
    judges = report["heldout"]
    names = ["proxy", *(f"held out {i}" for i in range(1, len(judges) + 1))] if judges[1:] else ["proxy", "held out"]
    rows = [["", "sqrt(KL)", *names, *(["all held out"] if judges[1:] else []), "length"]]
    for one in report["policies"]:
        values = [one["sqrt_kl"], *one["gains"].values(), *([one["held out"]] if judges[1:] else [])]
        rows.append([one["name"], *map(_text, values), f"{one['length']:.1f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{report['run']}: {report['prompts']} prompts, temperature {report['temperature']:g}, 95 % intervals; scores: "
        "gain over start, in standard deviations of its scores",
        f"proxy: {' + '.join(report['proxy'])}",
        *(f"{name}: {judge}" for name, judge in zip(names[1:], judges, strict=True)),
        *("  ".join(f"{x:>{w}}" for x, w in zip(row, widths, strict=True)) for row in rows),
    ]
    for judge, one in report["fit"].items():
        alpha, beta, peak = (_text(one[name]) for name in ("alpha", "beta", "peak"))
        measured = one["peak"][0] <= max(one["sqrt_kl"][0] for one in report["policies"])
        where = f"highest at d = {peak}" if measured else "still rising at the largest d"
        lines.append(f"{judge}: R(d) = d (alpha - beta log d), alpha {alpha}, beta {beta}, {where}")
    if part := report["parting"]:
        lines.append(
            f"they part at {part['policy']}: since {part['since']} the proxy has risen by {_text(part['proxy'])}, and "
            f"the held-out score has changed by {_text(part['heldout'])}"
        )
    else:
        lines.append("they do not measurably part: no policy has a higher proxy and a lower held-out score than before")
    lines.append(
        f"take: {report['take']}, the smallest KL whose held-out score is not measurably below the highest "
        f"({report['highest_heldout']})"
    )
    return "\n".join(lines)


def _text(interval: list[float]) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(*interval)
