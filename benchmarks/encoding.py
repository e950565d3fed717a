"""Tokens per second of one core that data/encode.py makes, against the same one dialogue at a time.

    python benchmarks/encoding.py TOKENIZER [TOKENIZER …] [--data_path FILE.jsonl] [--items 3000] [--max_tokens 2048]

TOKENIZER is a folder or a LLaMA-format tokenizer.model. Preferences in the shape of Anthropic's HH are made of the
texts in FILE (default: data/samples): 1 to 4 exchanges, two answers. One at a time: tests/helpers/plain_encoding.py,
over an eighth of the items. All tokens of the rows count: both dialogues of a pair, and the samples of answers that a
template rewrites. CPU seconds of this process. The results of both ways are compared.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))

from data.encode import encode_answers, encode_dialogues, encode_prompts  # noqa: E402
from data.texts import Texts  # noqa: E402
from tests.helpers.plain_encoding import Plain  # noqa: E402
from utils.tokenizer import load_tokenizer  # noqa: E402

BATCH = 1000
QWEN_3 = REPOSITORY / "tests/chat_templates/qwen3.jinja"


def texts_in(value) -> Iterator[str]:
    """Yields the texts of a JSON value that have several words."""
    if isinstance(value, str) and " " in value:
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from texts_in(part)


def preferences(file: Path, num_items: int) -> list[tuple[list[dict], list[str]]]:
    """Returns (history, two answers) of texts from `file`, each of which is one to four of its own."""
    pool = [text for line in file.read_text("utf-8").splitlines() for text in texts_in(json.loads(line))]
    rng = random.Random(0)

    def turn(role: str, most: int) -> dict[str, str]:
        return {"role": role, "content": " ".join(rng.choices(pool, k=rng.randint(1, most)))}

    items = []
    for _ in range(num_items):
        history = [turn("user", 2)]
        for _ in range(rng.choice([0, 1, 1, 2, 3])):
            history += [turn("assistant", 4), turn("user", 2)]
        items.append((history, [turn("assistant", 4)["content"] for _ in range(2)]))
    return items


def num_tokens(kind: str, rows: list) -> int:
    """Returns the number of token ids of the rows."""
    if kind == "answers":
        return sum(len(prompt) + len(answer) for _, sides in rows for prompt, answer, _ in sides or ())
    return sum(len(row[1] or ()) for row in rows)


def batched(kind: str, tokenizer, data: list, template: str, limit: int) -> tuple[list, int]:
    """Returns (a row per item, number of tokens of these and of the samples of rewritten answers)."""
    encode = {"answers": encode_answers, "dialogues": encode_dialogues, "prompts": encode_prompts}[kind]
    rows, tokens = [], 0
    for start in range(0, len(data), BATCH):
        texts = Texts(tokenizer)
        found = encode(texts, data[start : start + BATCH], template, limit)
        parts = [row[0][: k + 1] for row in found for k in row[3]] if kind == "dialogues" else []
        tokens += num_tokens(kind, found) + num_tokens(kind, encode(texts, parts, template, limit))
        rows += found
    return rows, tokens


def measure(name: str, tokenizer, template: str, items: list, limit: int) -> None:
    """Prints one line per kind of rows."""
    plain, few = Plain(tokenizer, template), max(1, len(items) // 8)
    dialogues = [[*history, {"role": "assistant", "content": answers[0]}] for history, answers in items]
    kinds = {"answers": items, "dialogues": dialogues, "prompts": [history for history, _ in items]}
    for kind, data in kinds.items():
        batched(kind, tokenizer, data[:20], template, limit)
        start = time.process_time()
        rows, tokens = batched(kind, tokenizer, data, template, limit)
        middle = time.process_time()
        expected = getattr(plain, kind)(data[:few], limit)
        end = time.process_time()
        assert rows[:few] == expected
        new, old = tokens / (middle - start), num_tokens(kind, expected) / (end - middle)
        mean = num_tokens(kind, rows) / len(rows)
        print(f"{name:40} {kind:9} {mean:4.0f} tokens per row: {new:9,.0f} per s, one by one {old:9,.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizers", nargs="+")
    parser.add_argument("--data_path", type=Path, default=REPOSITORY / "data/samples/en/preferences/train.jsonl")
    parser.add_argument("--items", type=int, default=3000)
    parser.add_argument("--max_tokens", type=int, default=2048)
    args = parser.parse_args()
    items = preferences(args.data_path, args.items)
    for path in args.tokenizers:
        for template in ("moss_en", "moss_zh"):
            measure(f"{Path(path).name} {template}", load_tokenizer(path, template), template, items, args.max_tokens)
        tokenizer = load_tokenizer(path)
        if not tokenizer.chat_template:
            continue
        measure(f"{Path(path).name} chat", tokenizer, "chat", items, args.max_tokens)
        tokenizer.chat_template = QWEN_3.read_text("utf-8")
        tokenizer.add_tokens(["<think>", "</think>"])
        measure(f"{Path(path).name} chat, as Qwen 3", tokenizer, "chat", items, args.max_tokens)


if __name__ == "__main__":
    main()
