"""The examples of reward functions, called as a run calls them; the remote one with a real server."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from ppo.user_reward import load_reward_functions
from tests.helpers.tiny_run import REPOSITORY, read_lines

FOLDER = REPOSITORY / "examples" / "rewards"


def said(spec: str, answers: list[str], rows: list[dict] | None = None):
    """What a function says of answers to prompts with these other columns."""
    config = SimpleNamespace(reward_fn=[f"{FOLDER}/{spec}"], reward_fn_weights=[], reward_fn_timeout=60.0)
    prompts = [[{"role": "user", "content": f"prompt {i}"}] for i in range(len(answers))]
    return load_reward_functions(config)(prompts, answers, rows or [{} for _ in answers])


@pytest.mark.parametrize(
    ("given", "reference", "score"),
    [
        ("The result is 18.", "3 * 6 = 18\n#### 18", 1.0),
        ("#### 18 or 19", "18", 1.0),
        ("18 or 19", "18", 0.0),
        ("it costs $1,250.00", "#### 1250", 1.0),
        ("-3", "3", 0.0),
        ("none", "#### 18", 0.0),
        ("18", "unknown", None),
    ],
)
def test_exact_answer(given, reference, score):
    found = said("gsm8k.py:exact", ["1", given], [{"answer": "1"}, {"answer": reference}])
    assert found.parts["reward_exact"] == [1.0, score]
    assert found.failed == [False, score is None]


def test_problems_have_answers_that_are_right():
    rows = read_lines(FOLDER / "data" / "problems.jsonl")
    assert len(rows) == 20 and all(row.keys() == {"question", "answer"} for row in rows)
    assert said("gsm8k.py:exact", [row["answer"] for row in rows], rows).scores == [1.0] * 20


def test_regular_expression():
    good, other = "<think>3 and 4\nare 7</think> <answer>7</answer>", "7 <answer>"
    assert said("regex.py:matches", [good, other]).scores == [1.0, 0.0]
    assert said("regex.py:matches", [good, other, "no"], [{"pattern": r"\d"}, {"pattern": r"\d.*"}, {}]).scores == [
        0,
        1,
        0,
    ]


def test_length_and_repetition():
    words = " ".join(f"w{i}" for i in range(75))
    found = said("length.py:brief", ["a b", words, "a a a a", ""])
    assert found.parts["reward_brief_words"] == [0.0, -0.5, 0.0, 0.0]
    assert found.parts["reward_brief_repeats"] == [0.0, 0.0, -0.75, 0.0]
    assert found.scores == [0.0, -0.5, -0.75, 0.0]
    assert said("length.py:brief", ["a b c"], [{"max_words": 2}]).scores == [-0.5]


class Scorer(BaseHTTPRequestHandler):
    """Gives each answer the number in it; fails once, and always for a batch with "broken" in it."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert len(asked["prompts"]) == len(asked["answers"]) <= 16
        with self.server.lock:
            self.server.sizes.append(len(asked["answers"]))
            first = len(self.server.sizes) == 1
        if first or "broken" in asked["answers"]:
            self.send_error(503)
            return
        scores = [float(answer) if answer != "empty" else None for answer in asked["answers"]]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"scores": scores}).encode())

    def log_message(self, *_):
        pass


def test_remote_scorer_in_batches_with_retries(monkeypatch, capfd):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Scorer)
    server.lock, server.sizes = threading.Lock(), []
    monkeypatch.setenv("REWARD_URL", f"http://127.0.0.1:{server.server_port}/score")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        answers = [*map(str, range(20)), "empty", *map(str, range(21, 36)), "broken"]
        found = said("remote.py:score", answers)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert found.parts["reward_score"] == [None if i == 20 or i >= 32 else float(i) for i in range(37)]
    assert sorted(server.sizes) == [5, 5, 5, 16, 16, 16] or sorted(server.sizes) == [5, 5, 5, 16, 16]
    assert "503" in capfd.readouterr().err
