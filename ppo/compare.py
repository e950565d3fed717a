"""Two policies on the same held-out prompts: `python -m ppo.compare --policies BEFORE AFTER --data_path PROMPTS ...`.

Answers are drawn as in evaluation (Part I §6.1), each prompt with the same random stream for both policies. The table
has means with 95 % intervals (bootstrap over prompts); the KL of AFTER to BEFORE is taken on plain samples of AFTER,
since only those estimate it rightly.
"""

from dataclasses import dataclass, field

from reward.scoring.flags import RewardFlags
from utils.errors import UserError
from utils.flags.parser import SEEDS, check_range, entry_point, parse_args

RESAMPLES = 2000


@dataclass
class CompareConfig(RewardFlags):
    """Compare two policies on held-out prompts."""

    policies: list[str] = field(default_factory=list)
    """Two model folders: before and after"""
    tokenizer_name_or_path: str | None = None
    """Tokenizer of both; default: the first policy's"""
    reward_fn: str | None = None
    """file.py:function that scores them too; runs that file"""
    data_path: str = ""
    """Prompts: the *valid* files, or all where there are none"""
    output: str | None = None
    """JSON file for the table and all answers"""
    num_prompts: int = 256
    """How many prompts"""
    maxlen_prompt: int = 2048
    """Tokens of prompt and answer together"""
    maxlen_res: int = 512
    """Longest answer, tokens"""
    rollout_batch_size: int = 64
    """Sequences decoded at once"""
    rollout_cache_tokens: int = 0
    """Tokens that their key-value cache may hold; 0: no limit"""
    micro_batch_tokens: int = 8192
    """Tokens of a forward pass"""
    num_samples: int = 3
    """Answers shown side by side: those to the first prompts, not picked"""
    seed: int = 42
    """Of the answers and the intervals"""
    offload_frozen: bool = False
    """Keep the reward models in host memory between scorings, one on the device at a time"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, rollout_cache_tokens=(0, None))
        for name in ("num_prompts", "maxlen_res", "rollout_batch_size", "micro_batch_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: give at least 1")
        check_range(self, seed=SEEDS)
        if len(self.policies) != 2:
            raise UserError("--policies needs two model folders, before and after")
        if not self.data_path:
            raise UserError("--data_path is missing: give it a path")
        if self.maxlen_res >= self.maxlen_prompt:
            raise UserError(
                f"--maxlen_res {self.maxlen_res} leaves no room in --maxlen_prompt {self.maxlen_prompt}: lower it, or "
                "raise that"
            )
        if not self.reward_model_path and not self.reward_fn:
            raise UserError("give --reward_model_path or --reward_fn: something has to judge the answers")


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Prints the table and the samples; one process."""
    config = parse_args(CompareConfig, argv)
    from ppo.compare_policies import judge_policies
    from utils.run.folder import check_output_file, write_result

    if config.output:
        check_output_file(config.output, "--output")

    before, after, kl = judge_policies(config)
    table = compare(before, after, kl, config.seed)
    print(render(table, config, len(before["rows"])))
    print(render_samples(before["rows"], after["rows"], config.num_samples))
    if config.output:
        answers = [b | {"answer_after": a["answer"]} for b, a in zip(before["rows"], after["rows"], strict=True)]
        write_result(config.output, "--output", {"policies": config.policies, "table": table, "answers": answers})
        print(f"written to {config.output}")


def compare(before: dict, after: dict, kl: list[float], seed: int) -> dict[str, dict[str, list[float]]]:
    """Metric -> {"before", "after", "difference"} -> [estimate, low, high]: bootstrap over prompts, the same for both.

    before, after: {"columns": {name: a number a prompt}} with columns length, nll (a response) and those that end in
    score; kl: a number a prompt, of AFTER.
    """
    import numpy

    count = len(kl)
    drawn = numpy.random.default_rng(seed).integers(count, size=(RESAMPLES, count))

    def interval(function) -> list[float]:
        low, high = numpy.percentile(function(drawn), [2.5, 97.5])
        return [float(function(numpy.arange(count)[None])[0]), float(low), float(high)]

    def mean_of(columns: dict, name: str):
        values = numpy.asarray(columns[name], dtype=float)
        return lambda rows: values[rows].mean(1)

    def perplexity_of(columns: dict, name: str):
        nll, length = (numpy.asarray(columns[key], dtype=float) for key in (name, "length"))
        return lambda rows: numpy.exp(nll[rows].sum(1) / length[rows].sum(1))

    table = {}
    for name in before["columns"]:
        make = perplexity_of if name.startswith("nll") else mean_of
        first, second = make(before["columns"], name), make(after["columns"], name)
        table[name.replace("nll", "perplexity")] = {
            "before": interval(first),
            "after": interval(second),
            "difference": interval(lambda rows, f=first, s=second: s(rows) - f(rows)),
        }
    table["kl"] = {"after": interval(mean_of({"kl": kl}, "kl"))}
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
