"""What the fuzz tests draw: texts, JSON and almost-records, with the traps that data really have.

Short by default, and then the same every time: so in CI. FUZZ_EXAMPLES=20000 asks for a long search, another each time:
    FUZZ_EXAMPLES=20000 python -m pytest tests/unit -k fuzz
"""

import contextlib
import os
import signal
from collections.abc import Iterator

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

ASKED = os.environ.get("FUZZ_EXAMPLES")
PATIENCE = 30  # seconds for one example; each takes milliseconds


def search(parts: int = 1) -> settings:
    """How long a test searches. parts: over how many settings of the test the long search is shared out."""
    return settings(
        max_examples=-(-int(ASKED) // parts) if ASKED else 100, derandomize=ASKED is None, deadline=None, database=None,
        print_blob=True, suppress_health_check=list(HealthCheck),
    )  # fmt: skip


fuzz = search()

TRAPS = [
    "", " ", "\n", "a", "Hi there", "你好", "😀 👍🏽", "Human:", "Human: a", "\n\nHuman: a\n\nAssistant: b",
    "Assistant:", "\n\nHuman: a\n\nAssistant:", "Human: a\n\nHuman: b", "<s>", "</s>", "<unk>", "<|Human|>", "<|MOSS|>",
    "<|im_end|>", "<|im_start|>assistant\n", "<0x41>", ":)", "://", "{{ 7 * 7 }}", "{% raw %}", "\ufeff",
    "\u2028", "\x85", "\x00", "\x1c", "half \ud83d", "\udc00", "a" * 300, "ﬁ", "e\u0301", "$(touch x)",
    "../../x", "'; rm -rf x; '",
]  # fmt: skip
ROLES = ["user", "human", "assistant", "gpt", "system", "User", "ASSISTANT", "tool", "", "prompter", "bot", "model"]
KEYS = [
    "prompt", "response", "responses", "chosen", "rejected", "messages", "conversations", "instruction", "input",
    "output", "text", "role", "content", "from", "value", "scores", "ranks", "subset", "margin",
    "mean preference difference", "mean_preference_difference", "std preference difference", "chosen score list",
    "rejected_score_list", "score",
]  # fmt: skip

whole = st.characters(codec="utf-8")  # every character that a file can hold
texts = st.one_of(
    st.sampled_from(TRAPS),
    st.text(whole, max_size=30),
    st.text(st.characters(exclude_categories=()), max_size=8),  # halves of surrogate pairs too
    st.lists(st.sampled_from([*TRAPS, " ", ":", "\n\n", "ing"]), min_size=2, max_size=5).map("".join),
)
huge = st.sampled_from([10**400, -(10**400), 1e308, float("inf"), float("nan")])
numbers = st.one_of(st.integers(-5, 5), st.integers(), st.floats(), huge)
leaves = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | texts, inner, max_size=4),
    max_leaves=12,
)


def mostly(strategy: st.SearchStrategy) -> st.SearchStrategy:
    """What belongs there, or once in a dozen times anything: most records have to be sound for the rest to be seen."""
    return st.integers(0, 11).flatmap(lambda k: values if k == 11 else strategy)


plain = st.sampled_from(["Hi", "你好", ":) x", "a </s> b", "😀"]) | st.text(whole, min_size=1, max_size=12)
hard = st.sampled_from(["half \ud83d", " ", "\n\nHuman: a", "Assistant:"])
mostly_text = st.integers(0, 9).flatmap(lambda k: hard if k == 8 else texts if k == 9 else plain)


@st.composite
def speech(draw) -> str:
    """A text that mostly can be used: white space at its ends, and not only that."""
    return draw(st.sampled_from(["", " ", "\n"])) + draw(mostly_text) + draw(st.sampled_from(["", " "]))


@st.composite
def messages(draw) -> list:
    """Turns of a dialogue, mostly one after the other, in one of the ways to write them."""
    count = draw(st.integers(0, 5))
    contents = [draw(mostly(speech())) for _ in range(count)]
    if draw(st.booleans()):
        return contents
    role, content = draw(st.sampled_from([("role", "content"), ("from", "value")]))
    turns = [{role: ("user", "assistant")[k % 2], content: text} for k, text in enumerate(contents)]
    if draw(st.integers(0, 3)) == 0:
        turns.insert(
            draw(st.integers(0, len(turns))), {role: draw(mostly(st.sampled_from(ROLES))), content: draw(texts)}
        )
    return turns


scores = st.lists(numbers, max_size=4)
FIELDS = {
    "prompt": mostly(messages() | speech()), "response": mostly(speech()),
    "responses": mostly(st.lists(speech(), max_size=4)),
    "chosen": mostly(messages() | speech()), "rejected": mostly(messages() | speech()), "messages": mostly(messages()),
    "conversations": mostly(messages()), "instruction": mostly(speech()), "input": mostly(speech()),
    "output": mostly(speech()), "text": mostly(speech()), "scores": mostly(scores), "ranks": mostly(scores),
    "subset": mostly(texts), "margin": mostly(numbers), "mean preference difference": mostly(numbers),
    "mean_preference_difference": mostly(numbers), "chosen score list": mostly(scores),
    "rejected_score_list": mostly(scores), "score": mostly(numbers),
}  # fmt: skip


def objects(*keys: str) -> st.SearchStrategy:
    """Records with these keys, and some of all others."""
    sure = {key: FIELDS[key] for key in keys}
    few = st.lists(st.sampled_from(sorted(FIELDS)), max_size=3, unique=True)
    return few.flatmap(lambda more: st.fixed_dictionaries(sure | {key: FIELDS[key] for key in more}))


dialogue_records = st.one_of(
    messages(), objects("messages"), objects("conversations"), objects("instruction", "output"),
    objects("prompt", "response"), objects("prompt"), values,
)  # fmt: skip


@st.composite
def pair_records(draw) -> dict:
    """Preferences that mostly share their history, with what annotators left."""
    history = [draw(speech()) for _ in range(draw(st.sampled_from([1, 1, 1, 3, 2])))]
    sides = [draw(mostly(speech())) for _ in range(2)] if draw(st.booleans()) else ["Yes", "No"]
    if draw(st.booleans()):
        record = {"prompt": history, "chosen": sides[0], "rejected": sides[1]}
    else:
        record = {"chosen": [*history, sides[0]], "rejected": [*history, sides[1]]}
    annotations = ["margin", "mean preference difference", "chosen score list", "rejected_score_list", "subset"]
    return record | draw(st.fixed_dictionaries({}, optional={key: FIELDS[key] for key in annotations}))


@st.composite
def ranked_records(draw) -> dict:
    """Answers of one prompt, mostly as many scores or ranks as there are."""
    responses = draw(st.lists(mostly(speech()), min_size=2, max_size=4))
    record = {"prompt": draw(mostly(speech())), "responses": responses}
    if draw(st.booleans()):
        size = len(responses)
        name = draw(st.sampled_from(["scores", "ranks"]))
        record[name] = draw(mostly(st.lists(numbers, min_size=size, max_size=size)))
    return record


preference_records = st.one_of(
    pair_records(), pair_records(), pair_records(), ranked_records(), ranked_records(), objects("prompt", "responses"),
    objects("prompt", "chosen", "rejected"), objects("chosen", "rejected"), values,
)  # fmt: skip


@contextlib.contextmanager
def ends() -> Iterator[None]:
    """Raises TimeoutError inside when it takes too long: a hang is a failure with its example, not a silence."""

    def late(*_) -> None:
        raise TimeoutError(f"not done after {PATIENCE} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
