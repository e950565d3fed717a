"""Cases of files of runs, of manifests of weights and of files of flags."""

from functools import partial
from pathlib import Path

from tests.hostile.case import Case, named, shown, values_of
from tests.hostile.changes import (
    Change,
    all_of,
    fifo,
    holding,
    in_place,
    nested,
    put,
)
from tests.hostile.checkpoints import NAN, fit
from tests.hostile.configs import again as kept
from tests.hostile.configs import files

LINE = {"a list": "[1]", "a number": "3", "text": '"x"', "no step": "{}",
    "a step of text": '{"step": "1"}',
        "a step of NaN": '{"step": NaN}', "no JSON": "hello", "not UTF-8": "\udcff", "deep": nested(50_000),
        "digits": '{"step": ' + "9" * 5000 + "}",
        "an empty line": "", "a list as step": '{"step": [1]}', "a huge line": '{"step": 1, "x": "' + "a" * 10**7
        + '"}',
        "an escape": '{"step": 1, "x": "\u009b2J\x1b[2J"}', "a half": '{"step": 1', }  # fmt: skip


def line(name: str, text: str, last: bool = False) -> Change:
    """One line more in a file of lines, before the others or after them."""

    def change(folder: Path) -> None:
        before = (folder / name).read_bytes()
        new = text.encode("utf-8", "surrogateescape")
        (folder / name).write_bytes(before + new if last else new + b"\n" + before)

    return change


report = partial(Case, "report", "ppo_run")
KEPT = "a foreign line is no reason to stop a run"
LEFT_OUT = "a comparison is left out of the report, which says why"
COMPARISON = {"": [3, []], "table": [3, {"score": {"before": 3}}, {"score": 3}, {"score": {"before": ["x", 1, 2]}}],
    "answers": [3, [3], [{}]]}  # fmt: skip
WHOLE = {"table": {"score": {"before": [1, 0, 2]}}, "answers": [{"prompt": "a", "answer": "b", "answer_after": "c"}]}
BROKEN = {
    "config.json of a list": put("config.json", "", []), "steps of text": put("config.json", "critic_pretrain_steps",
    "x"),
    "a FIFO as metrics": in_place("metrics.jsonl", fifo), "a FIFO as config": in_place("config.json", fifo),
    "a folder as metrics": in_place("metrics.jsonl", lambda p: p.mkdir()),
}  # fmt: skip
NO_NUMBERS = {
    "values of text": holding("metrics.jsonl", '{"step": 1, "score_mean": "x"}\n'),
    "values beyond floats": holding("metrics.jsonl", '{"step": 1, "score_mean": 1' + "0" * 400 + "}\n"),
    "a list as value": holding("metrics.jsonl", '{"step": 1, "score_mean": [1]}\n'),
    "samples without keys": holding("samples.jsonl", '{"step": 1}\n'),
}
RUNS = {
    "a FIFO as metrics": in_place("metrics.jsonl", fifo), "a folder as metrics": in_place("metrics.jsonl",
    lambda p: p.mkdir()),
    "a folder as config": in_place("config.json", lambda p: p.mkdir()), "a FIFO as samples": in_place("samples.jsonl",
    fifo),
}  # fmt: skip
FIRST = {title: line("metrics.jsonl", text) for title, text in LINE.items()}
LAST = {title: line("metrics.jsonl", text, last=True) for title, text in list(LINE.items())[:3]}
SAMPLES = {title: line("samples.jsonl", text, last=True) for title, text in list(LINE.items())[5:10]}
COMPARED = {
    f"{key or 'all'} = {shown(x)}": all_of(put("comparison.json", "", WHOLE), put("comparison.json", key, x))
    for key, values in COMPARISON.items() for x in values
}  # fmt: skip
RUN_FILES = (
    named("metrics.jsonl: {}, on resume", FIRST, fit, KEPT)
    | named("metrics.jsonl: {}, last, on resume", LAST, fit, KEPT)
    | named("metrics.jsonl: {}, reported", FIRST, report, KEPT)
    | named("samples.jsonl: {}, reported", SAMPLES, report, KEPT)
    | named("comparison.json: {}", COMPARED, report, LEFT_OUT)
    | named("{}", files("comparison.json", report), kept, LEFT_OUT)
    | named("report: {}", BROKEN, report)
    | named("report: {}", NO_NUMBERS, report, "what is no number is not drawn, and what is no sample is not shown")
    | named("run: {}", RUNS, fit)
)

recover = partial(Case, "merge", "diff", flags={"path_diff": "{model}"})
HASHES = {"dtype": "float16", "sha256": {}}
WEIGHT_MANIFEST = {
    "": [3, [], None, {"total": 1}, {"total": 1, "tuned": HASHES}, {"total": "x", "tuned": HASHES}, {"total": NAN,
    "tuned": HASHES, "raw": HASHES, "diff": HASHES},
         {"total": 1, "tuned": 3}, {"total": 1, "tuned": HASHES | {"dtype": "int8"}}, {"total": 1, "tuned": HASHES
         | {"sha256": {"a": 3}}, "raw": HASHES, "diff": HASHES},
         {"total": 1, "tuned": HASHES | {"more": 1}}, {"total": 10**400, "tuned": HASHES, "raw": HASHES,
         "diff": HASHES},
         {"total": [], "tuned": HASHES}, {"total": 1, "tuned": HASHES | {"dtype": []}, "raw": HASHES, "diff": HASHES}],
}  # fmt: skip
flags = partial(Case, "sft", "", flags={"config": "{model}/flags.json"})
yaml = partial(Case, "sft", "", flags={"config": "{model}/flags.yaml"})
YAML = {
    "a tag of Python": "lr: !!python/object/apply:os.system ['touch ran']", "an unknown tag": "lr: !no 3",
    "aliases of aliases":
    "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{c}: &{c} [{','.join([f'*{b}'] * 9)}]\n" for b, c in zip("abcdefgh",
    "bcdefghi")),
    "a key twice": "lr: 1\nlr: 2", "a list as key": "? [1]\n: 2", "deep": "lr: " + nested(20_000),
    "a document more": "lr: 1\n---\nlr: 2",
    "a date": "lr: 2020-01-01", "binary": "lr: !!binary aGk=", "a tab": "\tlr: 1", "an alias of nothing": "lr: *x",
    "an object": "lr: {a: 1}",
    "itself": "&a lr: *a", "an escape": 'lr: "\\e[2J"', "a date of no calendar": "lr: 2020-99-99",
    "sixties": "lr: 1:99:99",
}  # fmt: skip
FLAGS = {"": [3, [], None, {"lr": {"a": 1}}, {"lr": [1, 2]}, {"lr": NAN}, {"no\x1b[2J": 1}, {"": 1}, {"lr": "\ud800"}]}
TWICE = {"a key twice": "YAML takes the last one"}
CASES = (
    RUN_FILES
    | values_of("weight_manifest.json", WEIGHT_MANIFEST, recover)
    | files("weight_manifest.json", recover)
    | named("--config: {}", files("flags.json", flags) | values_of("flags.json", FLAGS, flags), kept)
    | named("--config: YAML: {}", {title: holding("flags.yaml", text) for title, text in YAML.items()}, yaml, TWICE)
)
