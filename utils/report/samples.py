"""The samples of a report as HTML: one card per prompt with its answers side by side. page.js searches and sorts."""

import html

from utils.report.choose import is_number
from utils.report.read import RunFiles
from utils.report.verdict import number

MAX_TEXT = 2000  # characters of a prompt or an answer
# What stands over an answer: key of its row -> word. Others, such as what a --reward_fn said, follow by their names.
WORDS = {"score": "score", "kl": "KL", "length": "length"}
TEXTS = ("step", "held_out", "prompt", "answer", "reference")
FORM = """<form id="filter" hidden>
<label>Search <input type="search" name="words" placeholder="words in prompt or answer"></label>
<label>Show <select name="held"><option value="">all</option><option value="1">held-out prompts</option>
<option value="0">training prompts</option></select></label>
<label>Step <select name="step"><option value="">all</option>{steps}</select></label>
{runs}<label>Order <select name="order"><option value="newest">newest first</option>
<option value="highest">highest score first</option><option value="lowest">lowest score first</option>
<option value="shortest">shortest answer first</option></select></label>
<output name="count"></output></form>"""


def samples_html(runs: list[RunFiles]) -> str:
    """Returns the section of samples; "" without any."""
    rows = [(place, row) for place, run in enumerate(runs) for row in run.samples]
    if not rows:
        return ""
    cards: dict[str, list[tuple[int, dict]]] = {}
    for place, row in rows:
        cards.setdefault(row["prompt"], []).append((place, row))
    ordered = sorted(cards.items(), key=lambda card: -max(row["step"] for _, row in card[1]))
    total = sum(run.num_samples for run in runs)
    chosen = f"{len(rows)} of {total} rows, from steps spread evenly over the run" if len(rows) < total else "all rows"
    steps = "".join(f"<option>{step}</option>" for step in sorted({row["step"] for _, row in rows}))
    names = "".join(f'<option value="{i}">{html.escape(run.name)}</option>' for i, run in enumerate(runs))
    choice = f'<label>Run <select name="run"><option value="">all</option>{names}</select></label>\n'
    form = FORM.format(steps=steps, runs=choice if len(runs) > 1 else "")
    several = [run.name for run in runs] if len(runs) > 1 else []
    listed = "\n".join(_card(prompt, answers, several) for prompt, answers in ordered)
    return f"""<h2 id="samples-of">Samples</h2>
<p>Not picked by score: {chosen} of samples.jsonl. Answers to the same prompt stand side by side.</p>
{form}
<div id="samples">
{listed}
</div>"""


def _card(prompt: str, answers: list[tuple[int, dict]], names: list[str]) -> str:
    answers = sorted(answers, key=lambda answer: (answer[1]["step"], answer[0]))
    parts = "\n".join(_answer(place, row, names) for place, row in answers)
    kind = ' class="many"' if len(answers) > 1 else ""
    return f'<article{kind}><div class="prompt">{text_html(prompt)}</div><div class="sides">\n{parts}\n</div></article>'


def _answer(place: int, row: dict, names: list[str]) -> str:
    held, score = row.get("held_out") is True, row.get("score")
    data = {"run": place, "step": row["step"], "held": int(held), "length": len(row["answer"])}
    if is_number(score):
        data["score"] = f"{score:.6g}"
    attributes = " ".join(f'data-{key}="{value}"' for key, value in data.items())
    words = [f"step {row['step']}" + (", held out" if held else "")]
    for key in [*WORDS, *(key for key in row if key not in (*WORDS, *TEXTS))]:
        if is_number(row.get(key)):
            words.append(f"{WORDS.get(key, key)} {number(row[key])}")
        elif isinstance(row.get(key), bool):
            words.append(key if row[key] else f"not {key}")
        elif isinstance(row.get(key), str) and len(row[key]) <= 40:
            words.append(f"{key} {row[key]}")
    name = f'<span class="key c{place % 6}">{html.escape(names[place])}</span> ' if names else ""
    reference = row.get("reference")
    more = (
        f"<details><summary>reference</summary>{text_html(reference)}</details>" if isinstance(reference, str) else ""
    )
    meta = f'<p class="meta">{name}{html.escape(" · ".join(words))}</p>'
    return f"<div {attributes}>{meta}{text_html(row['answer'])}{more}</div>"


def text_html(text: str) -> str:
    """Returns a text of a model or of data, escaped, cut if it is very long."""
    cut = f" … ({len(text) - MAX_TEXT} more characters)" if len(text) > MAX_TEXT else ""
    return f"<pre>{html.escape(text[:MAX_TEXT])}{cut}</pre>"
