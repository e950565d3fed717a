"""What `ppo.compare` writes and prints about a judge, and about more than two policies."""

from itertools import combinations

import numpy

from ppo.judge import Judge, dialogue_text
from ppo.judge_flags import JudgeFlags
from ppo.judge_statistics import Interval, bradley_terry, interval, judged_pair, mean, outcomes, pair_scores, resampled
from reward.win_rate import OUTCOMES

NAMES = {
    "win_rate": "win rate, a tie is half a win",
    "length_controlled_win_rate": "win rate at equal lengths",
    "first_place": "preferred the first place (0.5: no bias)",
    "orders_agree": "same verdict in both orders",
}


def score_columns(found: list[dict]) -> dict[str, list[list]]:
    """Returns name -> the scores of each policy, None where one is unknown, of what `sample_policies` returned."""
    names = [name for name in found[0]["columns"] if name in ("reward_fn score", "reward model score")]
    return {name: [each["columns"][name] for each in found] for name in names}


def ask_judge(judge: Judge, found: list[dict], seed: int) -> tuple[dict, numpy.ndarray]:
    """Returns (what the judge found, for JSON; scores of each pair as `bradley_terry` wants them)."""
    answers = [[row["answer"] for row in each["rows"]] for each in found]
    verdicts = judge.ask_pairs([dialogue_text(turns) for turns in found[0]["turns"]], answers)
    count, number = len(answers[0]), len(found)
    weights, pairs = resampled(count, seed), []
    scores = numpy.full((count, number, number), numpy.nan)
    columns = {name: numpy.array(values, dtype=float) for name, values in score_columns(found).items()}
    for i, j in combinations(range(number), 2):
        said, both = verdicts[i, j], list(zip(answers[i], answers[j], strict=True))
        same, lengths = numpy.array([a == b for a, b in both]), numpy.array([float(len(b) - len(a)) for a, b in both])
        differences = {name: x[j] - x[i] for name, x in columns.items()}
        scores[:, j, i] = outcomes(said, same)
        scores[:, i, j] = 1 - scores[:, j, i]
        shown = numpy.where(numpy.isnan(said), None, said).tolist()
        pairs.append({"policies": [i, j], "verdicts": shown} | judged_pair(said, same, lengths, differences, weights))
    return _cost(judge) | {"pairs": pairs}, scores


def add_judge(result: dict, judge: Judge, found: list[dict], seed: int) -> str:
    """Adds what the judge says to the result of `ppo.compare`. Returns it as text."""
    policies = result["policies"]
    result["judge"], scores = ask_judge(judge, found, seed)
    text = render_judge(result["judge"], policies, judge.config)
    if len(policies) > 2:
        ratings = rate({"judge": scores}, seed)
        result["ratings"] |= ratings
        text += "\n" + render_ratings(ratings, policies)
    return text


def _cost(judge: Judge) -> dict:
    config = judge.config
    names = ("requests", "cached", "unasked", "refused", "prompt_tokens", "completion_tokens")
    result = {"url": config.judge_url, "model": config.judge_model, "prompt": config.judge_prompt}
    result |= {"arguments": config.judge_fields} | {name: getattr(judge, name) for name in names}
    if config.judge_price:
        tokens = (judge.prompt_tokens, judge.completion_tokens)
        result["price"] = sum(a * b for a, b in zip(tokens, config.judge_price, strict=True)) / 1e6
    return result | {"unreadable": len(judge.unreadable), "example": (judge.unreadable or [""])[0][-400:]}


def render_judge(result: dict, policies: list[str], config: JudgeFlags) -> str:
    """Returns what the judge found as text: the cost, then a table per pair of policies."""
    cost = "{requests} requests, {cached} more replies known, {prompt_tokens} + {completion_tokens} tokens"
    lines = ["", f"judge {result['model']}: {cost.format(**result)}"]
    if "price" in result:
        lines[-1] += f", price {result['price']:.4g}"
    if result["unreadable"]:
        which = f"{result['refused']} of them refusals of the server, " if result["refused"] else ""
        example = f"the first one {result['example']!r}"
        lines.append(f"{result['unreadable']} replies are no verdict, {which}{example}; these answers are not counted")
    total = len(result["pairs"][0]["verdicts"])
    for pair in result["pairs"]:
        i, j = pair["policies"]
        lines.append(f"{policies[j]} against {policies[i]}: {pair['prompts']} of {total} prompts, 95 % intervals")
        if not pair["prompts"]:
            continue
        if pair["same_answers"]:
            lines.append(f"  {pair['same_answers']} with the same answer, which are ties")
        rows = [(name, pair[name], f"{pair['counts'][name]} prompts") for name in OUTCOMES]
        rows += [(NAMES[name], pair[name], "") for name in NAMES]
        for name, found in pair["agreement"].items():
            rows.append((f"agrees with the {name}", found["share"], f"{found['prompts']} prompts"))
        lines += [f"  {name:42}{_text(cell):>22}  {more}".rstrip() for name, cell, more in rows]
    if left := result["unasked"]:
        names = ("judge_max_requests", "judge_max_tokens")
        limits = [f"--{name} {limit}" for name in names if (limit := getattr(config, name))]
        lines.append(f"{left} requests were not sent: {' or '.join(limits)} ended; run again to go on")
    return "\n".join(lines)


def rate(scores: dict[str, numpy.ndarray], seed: int) -> dict[str, dict]:
    """Returns name -> {"ratings": an interval per policy, "win_rates": of row over column}, for more than two."""
    result = {}
    for name, values in scores.items():
        weights, numbers = resampled(len(values), seed), range(values.shape[1])
        rates = [[interval(mean(values[:, i, j], weights)) if i != j else None for j in numbers] for i in numbers]
        result[name] = {"ratings": bradley_terry(values, weights), "win_rates": rates}
    return result


def score_pairs(found: list[dict]) -> dict[str, numpy.ndarray]:
    """Returns name of a score -> scores of each pair as `bradley_terry` wants them."""
    return {name: pair_scores(columns) for name, columns in score_columns(found).items()}


def render_ratings(result: dict[str, dict], policies: list[str]) -> str:
    """Returns for each kind of score a table of win rates of rows over columns, and the ratings."""
    lines, width = [], max(map(len, policies))
    for name, found in result.items():
        title = "win rate of each policy over the others, and its rating (Bradley-Terry, Elo's scale)"
        numbers = "".join(f"{i:>8}" for i in range(1, len(policies) + 1))
        lines += ["", f"by {name}: {title}", f"{'':{width + 4}}{numbers}{'rating':>24}"]
        for i, policy in enumerate(policies):
            cells = "".join(f"{cell[0]:8.3f}" if cell else f"{'':8}" for cell in found["win_rates"][i])
            lines.append(f"{i + 1:2}  {policy:{width}}{cells}{_text(found['ratings'][i], '.0f'):>24}")
    return "\n".join(lines)


def _text(cell: Interval, form: str = ".3f") -> str:
    return "{:{f}} [{:{f}}, {:{f}}]".format(*cell, f=form) if cell else "unknown"
