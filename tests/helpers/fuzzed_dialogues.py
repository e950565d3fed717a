"""Random dialogues of all lengths: scripts, white space, tags written out, openings that merge with what is before."""

import random

WORDS = [
    "hello",
    "the",
    "answer",
    "is",
    "seven",
    "I",
    "do not",
    "know",
    "why",
    "it,",
    "but:",
    "see you.",
    "Human",
    "user",
]
ODD = [
    "é", "e\u0301", "ﬁ", "你好", "，", "ありがとう", "안녕", "שלום", "😀", "👩‍👩‍👧", "\u200b", "\u00a0",
    "\ufeff", "\x00", "\x1c", "▁", "Ġ",
    "//", ":)", "::", "\t", "\n", "\n\n", "\r\n", "  ", "    ", "0", "3.14", "{{ x }}", "</think>", "<think>", "<0x0A>",
    "<s>", "</s>", "<unk>", "<|im_end|>", "[INST]", "<|im", "|>", "\U0010ffff",
]  # fmt: skip


def text(rng: random.Random, tags: list[str]) -> str:
    """A text that is seldom empty but for white space; one in a hundred is long."""
    kind = rng.random()
    if kind < 0.04:
        return rng.choice(["", " ", "\n", "a", ":", ")", "  x  "])
    parts = []
    for _ in range(rng.randint(200, 600) if kind > 0.99 else rng.randint(1, 12)):
        draw = rng.random()
        odd = rng.choice(tags if tags and draw > 0.97 else ODD) if draw > 0.7 else rng.choice(WORDS)
        parts += [odd, rng.choice(["", " ", " ", " "])]
    whole = "".join(parts)
    return f"<think>\n{whole[:20]}\n</think>\n\n{whole}" if kind < 0.08 else whole


def dialogue(rng: random.Random, tags: list[str], system: bool) -> list[dict[str, str]]:
    """A dialogue of up to 60 turns that ends in an answer; one in twenty has at least ten turns.

    tags: what is written out now and then. system: half of the dialogues begin with a system turn.
    """
    size = rng.randint(5, 30) if rng.random() < 0.05 else rng.randint(1, 4)
    turns = [{"role": role, "content": text(rng, tags)} for _ in range(size) for role in ("user", "assistant")]
    first = [{"role": "system", "content": text(rng, tags)}] if system and rng.random() < 0.5 else []
    return first + turns
