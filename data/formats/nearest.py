"""Say what a record of an unknown form has, which form is nearest, and what to pass."""

from difflib import SequenceMatcher

from data.formats.columns import shown_name
from data.formats.records import SEEN
from data.formats.turns import kind_of

_SHOWN = 12  # columns in a message
_ALIKE = (
    ("prompt", "question", "query", "instruction", "problem", "input", "task", "request", "ask", "user", "text",
     "q", "问题"),
    ("response", "answer", "output", "completion", "solution", "target", "reply", "assistant", "result", "a", "回答",
     "答案", "chosen"),
    ("messages", "conversations", "conversation", "dialogue", "thread", "log"),
    ("chosen", "better", "preferred", "winner", "accepted", "positive", "good", "best"),
    ("rejected", "worse", "dispreferred", "loser", "negative", "bad", "worst"),
)  # fmt: skip


def nearest(value: dict, forms: list[tuple[str, tuple[str, ...]]]) -> str:
    """Returns ": it has the columns a, b; nearest: query and response lacks query (have: a); pass --columns query=a".

    forms: (name, needed columns, "a|b" for either) each. A column of an object in a column is named "outer.inner".
    """
    columns = [key for key, item in value.items() if item is not None]
    if not columns:
        return ": it has no columns" + (" with a value" if value else "")
    flat = [key for key in columns if not isinstance(value[key], dict)]
    inner = [f"{key}.{name}" for key in columns if isinstance(value[key], dict) for name in value[key]]
    name, found = max((_match(form, flat, inner) for form in forms), key=lambda one: one[0])[1:]
    lacking = {ours: theirs for ours, theirs in found.items() if ours not in flat}
    texts = [key for key in flat if isinstance(value[key], str) and key not in found.values()]
    unknown = [ours for ours, theirs in lacking.items() if theirs is None]
    if len(texts) == len(unknown) == 1 and texts[0] not in found:
        lacking[unknown[0]] = texts[0]
    shown = [shown_name(key) + " (null)" * (item is None) for key, item in value.items()]
    shown[_SHOWN:] = ["…"] * (len(shown) > _SHOWN)
    text = f"{SEEN}{', '.join(shown)}; nearest: {name}"
    if not lacking:
        return f"{text}, but {' and '.join(f'its {ours} is {kind_of(value[ours])}' for ours in found)}"
    have = ", ".join(shown_name(theirs) for theirs in lacking.values() if theirs)
    passed = " ".join(f"{ours}={shown_name(theirs or 'COLUMN')}" for ours, theirs in lacking.items())
    return f"{text} lacks {', '.join(lacking)}" + (f" (have: {have})" if have else "") + f"; pass --columns {passed}"


def _match(form: tuple[str, tuple[str, ...]], columns: list[str], inner: list[str]) -> tuple[float, str, dict]:
    """Returns (how well the columns fit the form, its name, the column for each that the form needs or None)."""
    name, needed = form
    exact = {one for column in needed for one in column.split("|")}
    free, found, total = [one for one in [*columns, *inner] if one not in exact], {}, 0.0
    for column in needed:
        names = column.split("|")
        have = next((one for one in names if one in columns), None)
        if have:
            found[have], total = have, total + 1
            continue
        score, best = max(((_likeness(names, one), one) for one in free), default=(0, None), key=lambda one: one[0])
        found[names[0]] = best if score >= 0.6 else None
        if score >= 0.6:
            total += score * 0.9
            free.remove(best)
    return total / len(needed), name, found


def _likeness(names: list[str], column: str) -> float:
    """Returns how much a column's name looks like one of the names: from 0 to 1."""
    column = column.rpartition(".")[2].casefold()[:40]
    alike = {other for group in _ALIKE if names[0] in group for other in group}
    if column in names:
        return 0.99
    if column in alike:
        return 0.9
    parts = set(column.replace("-", "_").replace(" ", "_").split("_"))
    if parts & {*names, *alike}:
        return 0.8
    return max(SequenceMatcher(None, name, column).ratio() * 0.8 for name in names)
