"""Cases of data: files that cannot be read, records that cannot be used, texts that do harm elsewhere."""

import json
from functools import partial

from tests.hostile.case import Case, named
from tests.hostile.changes import holding, in_place, nested
from tests.hostile.configs import PLACES as OF_FILES
from tests.hostile.weights import sparse

SOUND = [[f"Question {i}?", f"Answer {i}."] for i in range(9)]
PAIRS = [{"prompt": f"{i}?", "chosen": "good", "rejected": "bad"} for i in range(9)]
ALONE = {
    "deep": nested(100_000), "digits": "[" + "9" * 100_000 + "]", "NaN": "[NaN]",
    "Infinity": "[[Infinity, -Infinity]]", "empty": "", "a NUL": "\0",
    "white space": " \n\n ", "not UTF-8": '["\udcff"]', "cut": '[["a", "b"', "an object": '{"a": 1}',
    "a lone surrogate": '[["\\ud800", "b"]]',
    "UTF-16": json.dumps(SOUND).encode("utf-16").decode("latin-1"), "two lists": "[][]",
    "a key of a million letters": json.dumps([{"a" * 10**6: 1}]),
    "a byte order mark alone": "\ufeff", "an escape alone": "\x1b[2J", "a number": "3",
    "a list of lists of lists": "[[[[[]]]]]", "a million empty lists":
    "[" + "[]," * 200_000 + "[]]", "an HTML page": "<!DOCTYPE html><script>alert(1)</script>",
    "a pickle": "\x80\x02]q\x00.", "zip": "PK\x03\x04\x14\0\0\0",
}  # fmt: skip
TABLES = {
    "x.parquet": ["", "PAR1", "PAR1" + "\0" * 64 + "PAR1", "a,b\n1,2"], "x.csv": ["", '"', "a\0b\n", "a,a\n1,2\n",
    "\udcff\udcfe"],
    "x.txt": ["a"], "x": ["a"], "x.JSON": ["{"], "x.jsonl.gz": ["\x1f\x8b"], "x.pkl": ["\x80\x02]."],
    "x.py": ["import os"],
}  # fmt: skip
ESCAPES = {"ESC": "\x1b[2J\x1b[31m", "C1": "\x9b2J", "bidi": "\u202eabc\u2066", "BEL": "\x07", "CR": "a\rb",
    "DEL": "\x7f", "OSC": "\x1b]0;title\x07",
           "a line separator": "a\u2028b\u2029\x85", "a NUL": "a\0b", "BS": "a\x08\x08b"}  # fmt: skip
RECORDS = {
    "a number": 3, "null": None, "true": True, "text": "a", "an empty list": [], "an empty object": {},
    "a number among texts": ["a", 3], "a list in a list": [["a"]],
    "an empty text": ["", "b"], "white space": [" \n", "b"], "no answer": ["a"], "a huge number": 10**300,
    "a lone surrogate": ["half \ud83d", "b"],
    "messages of text": {"messages": "a"}, "messages of numbers": {"messages": [1, 2]},
    "no role": {"messages": [{"content": "a"}]},
    "a role of a list": {"messages": [{"role": ["user"], "content": "a"}]},
    "a role of NaN": {"messages": [{"role": float("nan"), "content": "a"}]},
    "a tool": {"messages": [{"role": "tool", "content": "a"}]}, "content in parts": {"messages": [{"role": "user",
    "content": [{"type": "text", "text": "a"}]}]},
    "content of null": {"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": None}]},
    "a system turn in the middle": {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"},
    {"role": "assistant", "content": "c"}]},
    "conversations of an object": {"conversations": {"from": "human"}},
    "an instruction of a list": {"instruction": ["a"], "output": "b"},
    "a prompt of an object": {"prompt": {"a": 1}, "response": "b"}, "a response of a number": {"prompt": "a",
    "response": 3},
    "a role with an escape": {"messages": [{"role": "\x1b[2J", "content": "a"}]},
    "a key with an escape": {"\x1b[2J": 1}, "deep inside": json.loads(nested(400)),
}  # fmt: skip
PREFERENCES = {
    "no rejected": {"prompt": "a", "chosen": "b"}, "both the same": {"prompt": "a", "chosen": "b", "rejected": "b"},
    "chosen of a number": {"prompt": "a", "chosen": 3, "rejected": "b"},
    "a margin of text": {"prompt": "a", "chosen": "b", "rejected": "c", "mean preference difference": "x"},
    "a margin of NaN": {"prompt": "a", "chosen": "b", "rejected": "c", "mean preference difference": float("nan")},
    "a margin beyond floats": {"prompt": "a", "chosen": "b", "rejected": "c", "mean preference difference": 10**400},
    "scores of text": {"prompt": "a", "responses": ["b", "c"], "scores": ["x", "y"]}, "fewer scores": {"prompt": "a",
    "responses": ["b", "c"], "scores": [1]},
    "infinite scores": {"prompt": "a", "responses": ["b", "c"], "scores": [float("inf"), 1]},
    "responses of text": {"prompt": "a", "responses": "bc", "scores": [1, 2]},
    "ranks of booleans": {"prompt": "a", "responses": ["b", "c"], "ranks": [True, False]},
    "a subset of a list": {"prompt": "a", "chosen": "b", "rejected": "c", "subset": ["x"]},
    "a subset of a lone surrogate": {"prompt": "a", "chosen": "b", "rejected": "c", "subset": "\ud800"},
}  # fmt: skip
TEXTS = ESCAPES | {
    "special tokens": "</s><s><|Human|>", "a template": "{{ 7 * 7 }}{% raw %}", "a shell": "$(touch ran)`touch ran`",
    "a path": "../../ran", "HTML": "<script>alert(1)</script>",
    "1 MB": "word " * 200_000, "one word of 100,000 letters": "a" * 100_000, "combining": "e" + "\u0301" * 5000,
    "spaces": " x" + " " * 20_000 + "x", "emoji": "👩‍👩‍👧‍👦" * 500,
    "ends of turns": "\n\nHuman: a\n\nAssistant: b", "zero width": "\u200b\u200d\ufeff" * 300,
    "private use": "\ue000\U0010ffff",
}  # fmt: skip
DROPPED, TEXT = "a record that cannot be used is dropped, and counted", "a text may hold anything"


def of(command: str, name: str):
    """Makes cases of a command on one file of data. A folder for PPO, which looks for *train.json there."""
    flags = {"input" if command == "score" else "data_path": "{model}" if command == "ppo" else "{model}/" + name}
    return lambda content, **more: Case(
        command, "", content if callable(content) else holding(name, content), flags, **more
    )


def lines(records: list) -> str:
    """A value per line, as json writes it."""
    return "".join(json.dumps(record) + "\n" for record in records)


sft, lines_of_sft, prompts, score = (
    of("sft", "x.json"),
    of("sft", "x.jsonl"),
    of("ppo", "train.json"),
    of("score", "x.json"),
)
PLACES = OF_FILES | {
    "a link to /dev/null": lambda path: path.symlink_to("/dev/null"),
    "a sparse file of 1 TB": lambda path: sparse(path, 1 << 40),
}
FEW = dict(list(ALONE.items())[:10:2])
CASES = (
    named("data: {}", ALONE, sft)
    | named("data: {}, as lines", FEW, of("score", "x.jsonl"))
    | named("data: {}, of prompts", FEW, prompts)
    | named("data: {} (sft)", {title: in_place("x.json", build) for title, build in PLACES.items()}, sft)
    | named("data: {} (prompts)", {title: in_place("train.json", build) for title, build in PLACES.items()}, prompts)
    | named("data: {} (score)", {title: in_place("x.json", build) for title, build in PLACES.items()}, score)
    | named("record: {}, alone", {title: lines([x, x]) for title, x in list(RECORDS.items())[::4]}, lines_of_sft)
    | named(
        "record: {}",
        {title: lines([*SOUND, x]) for title, x in RECORDS.items()},
        partial(lines_of_sft, says="dropped"),
        DROPPED,
    )
    | named(
        "preference: {}",
        {title: lines([*PAIRS, x]) for title, x in PREFERENCES.items()},
        partial(of("reward", "x.jsonl"), says="dropped"),
        DROPPED,
    )
    | named("text: {}", {title: lines([*SOUND, [text, text]]) for title, text in TEXTS.items()}, lines_of_sft, TEXT)
    | named(
        "text: {}, in a prompt",
        {title: json.dumps([[text]] * 11) for title, text in list(TEXTS.items())[:14:3]},
        prompts,
        TEXT,
    )
    | named(
        "text: {}, a subset",
        {title: lines([p | {"subset": text} for p in PAIRS]) for title, text in ESCAPES.items()},
        of("evaluate", "x.jsonl"),
        TEXT,
    )
)
for name, texts in TABLES.items():
    CASES |= named(
        f"data: {name} = {{}}",
        {ascii(text)[:20].translate({123: "(", 125: ")"}): text for text in texts},
        of("sft", name),
    )
