"""The Markdown table of outcomes that is committed."""

import importlib.metadata
from pathlib import Path

from tests.architectures.checks import STAGES
from tests.architectures.outcome import KINDS, Outcome

HEAD = """# Architectures

Every family for which transformers has a causal LM, as a tiny random float32 model (2 to 6 layers, hidden 64, windows
of 6 tokens), and variants of some. Each stage loads the folder as its command does, and its numbers are held against
transformers' own forwards of one sequence at a time, without padding, mask and cache.

- ppo: log-probs, entropy and gradient of padded rows, log-probs of what was decoded, exported tensors and logits. In
  brackets how it decodes: `straight` and `grouped` are this toolkit's faster ways, `own` is the model's forward.
- sft: the answers' loss, of packed dialogues too unless it says "not packed".
- reward: every scalar, and the scores of the saved classifier, loaded by transformers. With LM loss: that loss.

*equal*: to 1e-4 (relative; most to 1e-6). *refused*: the command stops with the line below before a step is made.

    python -m tests.architectures --table benchmarks/ARCHITECTURES.md
"""


def write_table(outcomes: list[Outcome], file: Path) -> None:
    """Writes one row for each family that was built, the refusals, and what was not built and why."""
    built = [outcome for outcome in outcomes if outcome.stages]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch"))
    kinds = [outcome.kind for outcome in outcomes]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in KINDS)
    seconds = sum(outcome.seconds for outcome in outcomes)
    lines = [HEAD, f"{versions}; {len(outcomes)} names: {counts}; {seconds:.0f} s on one core.", ""]
    lines += [f"| family | {' | '.join(STAGES)} |", "|---" * (len(STAGES) + 1) + "|"]
    texts: dict[str, int] = {}
    for outcome in built:
        cells = [_cell(outcome, stage, texts) for stage in STAGES]
        lines.append(f"| {outcome.name} | {' | '.join(cells)} |")
    lines += ["", "## Refusals and differences", ""]
    lines += [f"{number}. {text}" for text, number in texts.items()]
    lines += ["", "## Not built", ""]
    lines += [f"- {outcome.name}: {outcome.reason}" for outcome in outcomes if not outcome.stages]
    file.write_text("\n".join(lines) + "\n", "utf-8")


def _cell(outcome: Outcome, stage: str, texts: dict[str, int]) -> str:
    """The kind, and in brackets how it ran or the number of what was said; names are left out of it."""
    result = outcome.stages[stage]
    if result.kind == "equal":
        return f"equal ({result.text})" if result.text else "equal"
    text = result.text.replace(" source", "").replace(f" {outcome.name} ", " … ")
    return f"{result.kind} [{texts.setdefault(text, len(texts) + 1)}]"
