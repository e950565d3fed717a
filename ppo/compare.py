"""Policies on the same held-out prompts: `python -m ppo.compare --policies BEFORE AFTER --data_path PROMPTS ...`.

Answers are drawn as in evaluation (Part I §6.1), with the same random streams for all. The table has means with 95 %
intervals (bootstrap over prompts); the KL of AFTER to BEFORE is estimated on plain samples of AFTER. With --judge_url a
language model compares the answers, too.
"""

from ppo.compare_flags import CompareConfig
from utils.flags.config_file import load_flags
from utils.flags.parser import FlagParser, entry_point, parse_args

RESAMPLES = 2000


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Prints the table, the samples and what a judge says; with --checkpoints, ppo.overoptimisation. One process."""
    if _asks_for_checkpoints(argv):
        from ppo.overoptimisation import main as score_checkpoints

        score_checkpoints(argv)
        return
    config = parse_args(CompareConfig, argv)
    from ppo.compare_policies import sample_policies
    from ppo.judge_report import add_judge, rate, render_ratings, score_pairs
    from utils.files import check_output_file, is_special, write_json

    if config.output:
        check_output_file(config.output, "--output")
    judge = None
    if config.judge_url:
        from ppo.judge import Judge

        judge = Judge(config)  # before the sampling, which takes long

    found = sample_policies(config)
    count, tables = len(found[0]["rows"]), [compare(found[0], after, after["kl"], config.seed) for after in found[1:]]
    for table, after in zip(tables, config.policies[1:], strict=True):
        print(render(table, config.policies[0], after, count))
    print(render_samples([each["rows"] for each in found], config.num_samples))
    result = {"policies": config.policies, "table": tables[0], "answers": _answers([each["rows"] for each in found])}
    if len(found) > 2:
        result |= {"tables": tables, "ratings": rate(score_pairs(found), config.seed)}
        print(render_ratings(result["ratings"], config.policies))
    if judge:
        if config.output and not is_special(config.output):  # the judge may fail
            write_json(config.output, result, "--output")
        print(add_judge(result, judge, found, config.seed))
    if config.output:
        write_json(config.output, result, "--output")
        print(f"written to {config.output}")


def _asks_for_checkpoints(argv: list[str]) -> bool:
    """Whether --checkpoints is on the command line, or in the file of --config."""
    parser = FlagParser(allow_abbrev=False, add_help=False)
    for name in ("--checkpoints", "--config"):
        parser.add_argument(name, nargs="?", const="")  # without a value: the whole parser says so
    found, _ = parser.parse_known_args(argv)
    return found.checkpoints is not None or bool(found.config and "checkpoints" in load_flags(found.config)[0])


def _answers(rows: list[list[dict]]) -> list[dict]:
    """Returns {"prompt", "answer" of the first policy, "answer_after" of the second, "answer_3", ...} per prompt."""
    names = ["answer", "answer_after", *(f"answer_{i}" for i in range(3, len(rows) + 1))]
    texts = ([row["answer"] for row in each] for each in zip(*rows, strict=True))
    return [
        {"prompt": row["prompt"]} | dict(zip(names, each, strict=True))
        for row, each in zip(rows[0], texts, strict=True)
    ]


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


def render(table: dict, before: str, after: str, count: int) -> str:
    """The table as text."""
    columns = ("before", "after", "difference")
    rows = [["", *columns]]
    for name, cells in table.items():
        texts = ("{:.3f} [{:.3f}, {:.3f}]".format(*cells[column]) if column in cells else "" for column in columns)
        rows.append([name, *texts])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{count} prompts, 95 % intervals. before: {before}, after: {after}"]
    for name, *texts in rows:
        cells = "  ".join(f"{text:>{width}}" for text, width in zip(texts, widths[1:], strict=True))
        lines.append(f"{name:{widths[0]}}  {cells}".rstrip())
    return "\n".join(lines)


def render_samples(rows: list[list[dict]], count: int) -> str:
    """The answers of each policy to the first prompts, one under the other."""
    names = ["before:", "after: "] if len(rows) == 2 else [f"{i}:" for i in range(1, len(rows) + 1)]
    lines = []
    for answers in zip(*(each[:count] for each in rows), strict=True):
        lines += ["", f"prompt: {answers[0]['prompt']}"]
        lines += [f"{name} {row['answer']}" for name, row in zip(names, answers, strict=True)]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
