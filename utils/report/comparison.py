"""What a report shows of comparison.json, which ppo.compare wrote: tables, ratings, what a judge said, answers."""

import html
from itertools import zip_longest

from utils.html import html_table
from utils.report.read import RunFiles
from utils.report.samples import text_html
from utils.report.verdict import before_after, interval

NUM_ANSWERS = 12  # that are shown


def comparison_html(run: RunFiles) -> str:
    """Returns the section of a run's comparison; "" without one."""
    if not run.comparison:
        return ""
    names, answers = run.policies, run.comparison["answers"]
    parts = [f"<p>{html.escape(run.name)}: {len(answers)} prompts; means with 95 % intervals over prompts.</p>"]
    for place, table in enumerate(run.comparison.get("tables") or [run.comparison["table"]], 1):
        which = before_after([names[0], names[place]] if place < len(names) else [])
        columns = list(dict.fromkeys(column for row in table.values() for column in row))
        rows = [[name, *(interval(row[x]) if x in row else "" for x in columns)] for name, row in table.items()]
        parts.append(_table(which, ["", *columns], rows))
    parts += [*_ratings(run.comparison, names), *_judge(run.comparison, names), _answers(answers, names)]
    return "\n".join(parts)


def _table(caption: str, header: list[str], rows: list[list[str]]) -> str:
    above = f"<p>{html.escape(caption)}</p>\n" if caption else ""
    return f'{above}<div class="wide">{html_table(header, rows)}</div>'


def _name(names: list[str], place: int) -> str:
    return names[place] if place < len(names) else f"policy {place + 1}"


def _ratings(comparison: dict, names: list[str]) -> list[str]:
    """Returns a table of the policies' ratings, with a column per kind of score, if there are ratings."""
    found = comparison.get("ratings", {})
    columns = zip_longest(*(each["ratings"] for each in found.values()))
    rows = [[_name(names, place), *map(interval, row)] for place, row in enumerate(columns)]
    caption = "Bradley-Terry ratings on Elo's scale: 400 more is ten wins to one loss"
    return [_table(caption, ["", *(f"by {kind}" for kind in found)], rows)] if found else []


def _judge(comparison: dict, names: list[str]) -> list[str]:
    """Returns a table of a judge's win rates, with a row per pair of policies, if there was a judge."""
    if not (judge := comparison.get("judge")):
        return []
    rows = []
    for pair in judge["pairs"]:
        before, after = (_name(names, place) for place in pair["policies"])
        rates = (interval(pair.get(key)) for key in ("win_rate", "length_controlled_win_rate"))
        rows.append([f"{after} against {before}", pair["prompts"], *rates])
    header = ["", "prompts", "win rate, a tie is half a win", "win rate at equal lengths"]
    return [_table(f"By the judge {judge['model']}", header, rows)]


def _answers(answers: list[dict], names: list[str]) -> str:
    """Returns the first answers of the first two policies, folded away."""
    heads = [": ".join(pair) for pair in zip(("before", "after"), names, strict=False)] if len(names) > 1 else []
    before, after = map(html.escape, heads or ("before", "after"))
    shown = "".join(
        f'<article><div class="prompt">{text_html(row["prompt"])}</div><div class="sides"><div><p class="meta">{before}'
        f'</p>{text_html(row["answer"])}</div><div><p class="meta">{after}</p>{text_html(row["answer_after"])}</div>'
        "</div></article>\n"
        for row in answers[:NUM_ANSWERS]
    )
    return f"""<details><summary>The answers to the first {min(NUM_ANSWERS, len(answers))} prompts</summary>
{shown}</details>"""
