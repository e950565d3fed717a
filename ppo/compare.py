"""Two policies on the same held-out prompts: `python -m ppo.compare --policies BEFORE AFTER --data_path PROMPTS ...`.

Answers are drawn as in evaluation (Part I §6.1), with the same random streams for both. The table has means with 95 %
intervals (bootstrap over prompts); the KL of AFTER to BEFORE is estimated on plain samples of AFTER.
"""

from ppo.compare_flags import CompareConfig
from utils.flags.parser import entry_point, parse_args

RESAMPLES = 2000


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Prints the table and the samples; with --checkpoints, those of ppo.overoptimisation. One process."""
    if any(word.partition("=")[0] == "--checkpoints" for word in argv):
        from ppo.overoptimisation import main as score_checkpoints

        score_checkpoints(argv)
        return
    config = parse_args(CompareConfig, argv)
    from ppo.compare_policies import judge_policies
    from utils.files import check_output_file, write_json

    if config.output:
        check_output_file(config.output, "--output")

    before, after, kl = judge_policies(config)
    table = compare(before, after, kl, config.seed)
    print(render(table, config, len(before["rows"])))
    print(render_samples(before["rows"], after["rows"], config.num_samples))
    if config.output:
        answers = [b | {"answer_after": a["answer"]} for b, a in zip(before["rows"], after["rows"], strict=True)]
        write_json(config.output, {"policies": config.policies, "table": table, "answers": answers}, "--output")
        print(f"written to {config.output}")


def compare(before: dict, after: dict, kl: list[float], seed: int) -> dict[str, dict[str, list[float]]]:
    """Metric -> {"before", "after", "difference"} -> [estimate, low, high]: bootstrap over prompts, the same for both.

    before, after: {"columns": {name: one number per prompt}}; names that begin with nll, per response, become
    perplexities. kl: one number per prompt, of AFTER. A prompt without a number for one of them counts for neither.
    """
    import numpy

    count = len(kl)
    drawn = numpy.random.default_rng(seed).integers(count, size=(RESAMPLES, count))

    def interval(function) -> list[float]:
        low, high = numpy.nanpercentile(function(drawn), [2.5, 97.5])
        return [float(function(numpy.arange(count)[None])[0]), float(low), float(high)]

    def mean_of(values, columns: dict):
        known, values = ~numpy.isnan(values), numpy.nan_to_num(values)

        def mean(rows):
            with numpy.errstate(invalid="ignore"):  # of a resample in which none is known: no part of the interval
                return values[rows].sum(1) / known[rows].sum(1)

        return mean

    def perplexity_of(nll, columns: dict):
        length = numpy.asarray(columns["length"], dtype=float)
        return lambda rows: numpy.exp(nll[rows].sum(1) / length[rows].sum(1))

    table, columns = {}, [before["columns"], after["columns"]]
    for name in before["columns"]:
        pair = numpy.array([found.get(name, [None] * count) for found in columns], dtype=float)
        pair[:, numpy.isnan(pair).any(0)] = numpy.nan  # --reward_fn may give no number
        if numpy.isnan(pair).all():
            continue
        make = perplexity_of if name.startswith("nll") else mean_of
        first, second = map(make, pair, columns)
        table[name.replace("nll", "perplexity")] = {
            "before": interval(first),
            "after": interval(second),
            "difference": interval(lambda rows, f=first, s=second: s(rows) - f(rows)),
        }
    table["kl"] = {"after": interval(mean_of(numpy.asarray(kl), {}))}
    return table


def render(table: dict, config: CompareConfig, count: int) -> str:
    """The table as text."""
    columns = ("before", "after", "difference")
    rows = [["", *columns]]
    for name, cells in table.items():
        texts = ("{:.3f} [{:.3f}, {:.3f}]".format(*cells[column]) if column in cells else "" for column in columns)
        rows.append([name, *texts])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{count} prompts, 95 % intervals. before: {config.policies[0]}, after: {config.policies[1]}"]
    for name, *texts in rows:
        cells = "  ".join(f"{text:>{width}}" for text, width in zip(texts, widths[1:], strict=True))
        lines.append(f"{name:{widths[0]}}  {cells}".rstrip())
    return "\n".join(lines)


def render_samples(before: list[dict], after: list[dict], count: int) -> str:
    """The answers to the first prompts, one under the other."""
    lines = []
    for first, second in zip(before[:count], after[:count], strict=True):
        lines += ["", f"prompt: {first['prompt']}", f"before: {first['answer']}", f"after:  {second['answer']}"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
