"""The Markdown table of outcomes that is committed."""

import importlib.metadata
import re
from pathlib import Path

from tests.architectures.checks import STAGES
from tests.architectures.outcome import Outcome, counts

HEAD = """# Architectures

Every family for which transformers has a causal LM, as a tiny random float32 model (2 to 6 layers, hidden 64, windows
of 6 tokens), and variants of some. Each stage loads the folder as its command does, and its numbers are held against
transformers' own forwards of one sequence at a time, without padding, mask and cache.

- ppo: log-probs, entropy and gradient of padded rows, log-probs of what was decoded, exported tensors and logits. In
  brackets how it decodes: `llama_step` and `grouped` are faster ways, `transformers` is the model's forward.
- sft: the answers' loss, of packed dialogues too unless it says "not packed".
- reward: every scalar, and the scores of the saved classifier, loaded by transformers. With LM loss: that loss.

*equal*: to 1e-4 (relative; most to 1e-6). *refused*: the command stops with the line below before a step is made.

    python -m tests.architectures --table benchmarks/ARCHITECTURES.md
"""


def write_table(outcomes: list[Outcome], file: Path) -> None:
    """Writes one row for each name that was built, what refusals say, and what was not built and why."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch"))
    seconds = sum(outcome.seconds for outcome in outcomes)
    lines = [f"{HEAD}\n{versions}; {seconds:.0f} s.", "", *(f"- {line}" for line in counts(outcomes)), ""]
    lines += [f"| name | {' | '.join(STAGES)} |", "|---" * (len(STAGES) + 1) + "|"]
    texts: dict[str, int] = {}
    for outcome in outcomes:
        if outcome.stages:
            cells = [_cell(outcome, stage, texts) for stage in STAGES]
            lines.append(f"| {outcome.name} | {' | '.join(cells)} |")
    lines += ["", "## What refusals say", "", *(f"{number}. {text}" for text, number in texts.items())]
    lines += ["", "## Not built", ""]
    lines += [f"- {outcome.name}: {outcome.reason}" for outcome in outcomes if not outcome.stages]
    file.write_text("\n".join(lines) + "\n", "utf-8")


def _cell(outcome: Outcome, stage: str, texts: dict[str, int]) -> str:
    """The kind, and in brackets how it ran or the number of what was said: one for all that differ in names alone."""
    result = outcome.stages[stage]
    if result.kind == "equal":
        return f"equal ({result.text})" if result.text else "equal"
    text = re.sub(r"(?<=off by )[\d.e+-]+", "…", result.text.replace(" source", ""))
    text = re.sub(r"\b(?!Auto)\w+(ForCausalLM|LMHeadModel|WithLMHead|Model)\b", "…", text)
    text = re.sub(r"(?<=a )(?!causal)[\w-]+(?= model[, ])", "…", text)
    return f"{result.kind} [{texts.setdefault(text, len(texts) + 1)}]"
