"""Cases of data: files that cannot be read, records that cannot be used, texts that do harm elsewhere."""

import json
import os
from functools import partial

from tests.hostile.case import Case
from tests.hostile.changes import fifo, holding, in_place, nested

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


def case(command: str, name: str, content: str, **options) -> Case:
    """A command on one file of data."""
    flag = "input" if command == "score" else "data_path"
    return Case(command, "", holding(name, content), {flag: "{model}/" + name}, **options)


def lines(records: list) -> str:
    """A value per line, as json writes it."""
    return "".join(json.dumps(record) + "\n" for record in records)


at = {"sft": "{model}/x.json", "ppo": "{model}", "score": "{model}/x.json"}
sft, ppo, score = (
    partial(Case, command, "", flags={"input" if command == "score" else "data_path": path})
    for command, path in at.items()
)
PLACES = {"a FIFO": fifo, "a folder": lambda path: path.mkdir(),
    "a link to itself": lambda path: path.symlink_to(path.name),
          "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
          "a link to /dev/null": lambda path: path.symlink_to("/dev/null"),
          "a sparse file of 1 TB": lambda path: (path.touch(), os.truncate(path, 1 << 40))}  # fmt: skip
CASES = (
    {f"data: {title}": case("sft", "x.json", text) for title, text in ALONE.items()}
    | {f"data: {title}, as lines": case("score", "x.jsonl", text) for title, text in ALONE.items()
    if title not in ("empty", "white space")}
    | {f"data: {title}, of prompts": Case("ppo", "", holding("train.json", text), {"data_path": "{model}"}) for title,
    text in list(ALONE.items())[:3]}
    | {f"data: {name} = {text[:20]!r}": case("sft", name, text) for name, texts in TABLES.items() for text in texts}
    | {f"data: {title} as file": make(in_place(name, build)) for make, name in ((sft, "x.json"), (ppo, "train.json"),
    (score, "x.json"))
       for title, build in PLACES.items() for title in (f"{title} ({name}, {make.args[0]})",)}
    | {f"record: {title}": case("sft", "x.jsonl", lines([*SOUND, record]), accepted=DROPPED, says="dropped") for title,
    record in RECORDS.items()}
    | {f"record: {title}, alone": case("sft", "x.jsonl", lines([record, record])) for title,
    record in list(RECORDS.items())[::4]}
    | {f"preference: {title}": case("reward", "x.jsonl", lines([*PAIRS, record]), accepted=DROPPED, says="dropped")
    for title, record in PREFERENCES.items()}
    | {f"text: {title}": case("sft", "x.jsonl", lines([*SOUND, [text, text]]), accepted=TEXT) for title,
    text in TEXTS.items()}
    | {f"text: {title}, a subset": case("evaluate", "x.jsonl", lines([p | {"subset": text} for p in PAIRS]),
    accepted=TEXT) for title, text in list(ESCAPES.items())[:5]}
    | {f"text: {title}, in a prompt": Case("ppo", "", holding("train.json", json.dumps([[text]] * 11)),
    {"data_path": "{model}"}, accepted=TEXT)
       for title, text in list(TEXTS.items())[:14:3]}
)  # fmt: skip
