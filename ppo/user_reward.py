"""User code of --reward_fn: loading the functions, giving them what they ask for, checking what they return."""

import copy
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ppo.reward_call import call_together, call_within
from ppo.reward_fn_flags import RewardFunctionFlags
from ppo.user_function import load_function
from utils.errors import Say, UserError
from utils.watchdog import report_progress

Column = list[float | None]
FORM = "(prompts, answers) or (prompts, answers, **columns)"
NUM_CHECKED = 1000  # prompts in which the columns that a function needs are looked for


@dataclass(frozen=True)
class UserScores:
    """What the functions say of some answers. scores: weighted sums; 0 where `failed`: a function returned None.

    parts: by the names of metrics, what each function returned, and each part of it if it returned a dict.
    """

    scores: list[float]
    failed: list[bool]
    parts: dict[str, Column]


class RewardFunction:
    """A function of --reward_fn. label: its name in messages; metric: in metrics.

    needed, optional: columns that are its parameters, without and with a default; takes_all: it has **columns.
    reserved: names of its first two parameters, which columns of **columns cannot have.
    """

    def __init__(self, function: Callable, label: str = "--reward_fn", metric: str = "reward", weight: float = 1.0):
        self.function, self.label, self.metric, self.weight = function, label, metric, weight
        # An object with an async method __call__ is itself no coroutine function.
        self.is_async = any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # written in C: it does not tell
            parameters = [inspect.Parameter("any", inspect.Parameter.VAR_POSITIONAL)]
        first = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        starred = any(p.kind == p.VAR_POSITIONAL for p in parameters)
        if (len(first) < 2 and not starred) or (first and first[0].name == "completions"):  # as TRL calls them
            raise UserError(f"{label} has the parameters ({', '.join(map(str, parameters))}); write it as {FORM}")
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p not in first[:2]]
        self.needed = [p.name for p in named if p.default is p.empty]
        self.optional = [p.name for p in named if p.default is not p.empty]
        self.takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters)
        self.reserved = {p.name for p in first[:2] if self.takes_all and p.kind == p.POSITIONAL_OR_KEYWORD}

    def __call__(self, prompts: list[list[dict]], answers: list[str], rows: list[dict[str, Any]]):
        """Calls the function with copies. rows: the columns of each prompt, None for those that it lacks."""
        wanted = dict.fromkeys(self.needed)
        for name in (name for row in rows for name in row):
            if name in self.optional or (self.takes_all and name not in self.reserved):
                wanted[name] = None
        columns = {name: [row.get(name) for row in rows] for name in wanted}
        return self.function(copy.deepcopy(prompts), list(answers), **copy.deepcopy(columns))

    def parts(self, returned, count: int) -> dict[str, Column]:
        """Returns metric -> a number or None per answer: of the function, and of each part if it returned a dict."""
        if not isinstance(returned, dict):
            return {self.metric: _numbers(returned, self.label, count)}
        parts = {f"{self.metric}_{name}": _numbers(x, f"{self.label}: {name}", count) for name, x in returned.items()}
        rows = zip(*parts.values(), strict=True)
        return {self.metric: _numbers((_sum(row) for row in rows), self.label, count)} | parts


@dataclass(frozen=True)
class UserReward:
    """The functions of --reward_fn. timeout: seconds per call of each; 0: no limit."""

    functions: list[RewardFunction]
    timeout: float = 0.0

    def check_columns(self, rows: list[dict[str, Any]], say: Say) -> None:
        """Raises UserError if a function needs a column that no row has. Says which columns do not reach one."""
        present = {name for row in rows for name in row}
        for function in self.functions:
            for name in function.needed:
                if name not in present:
                    raise UserError(
                        f"{function.label} needs the column {name!r}, which none of {len(rows)} prompts has (columns: "
                        f"{', '.join(sorted(present)) or 'none'}); rename one, or give the parameter a default"
                    )
            for name in sorted(present & function.reserved):
                say(f"warning: the column {name!r} does not reach {function.label}, which has a parameter of that name")

    def __call__(
        self, prompts: list[list[dict]], answers: list[str], rows: list[dict[str, Any]], finite: bool = False
    ) -> UserScores:
        """Returns what the functions say of the answers; rows: the columns of their prompts.

        They run one after the other, then those that are async together. Raises UserError for what `call_within` does,
        for results other than numbers and None, and with `finite` for NaN and infinity.
        """
        returned, waiting = {}, {}
        for function in self.functions:
            call = lambda f=function: f(prompts, answers, rows)  # noqa: E731
            if function.is_async:
                waiting[function] = call
            else:
                returned[function] = call_within(self.timeout, function.label, call)
                report_progress(function.label)
        if waiting:
            results = call_together(self.timeout, [(function.label, call) for function, call in waiting.items()])
            returned |= zip(waiting, results, strict=True)
            report_progress("--reward_fn")
        parts, totals = {}, []
        for function in self.functions:
            found = function.parts(returned[function], len(answers))
            if twice := parts.keys() & found.keys():
                raise UserError(f"{function.label}: {min(twice)} is the name of two scores of --reward_fn; rename one")
            parts |= found
            totals.append([None if x is None else function.weight * x for x in found[function.metric]])
            for i, score in enumerate(found[function.metric]):
                if finite and score is not None and not math.isfinite(score):
                    raise UserError(f"{function.label} returned {score:g} for answer {i}; return finite numbers")
        sums = [_sum(row) for row in zip(*totals, strict=True)]
        return UserScores([x or 0.0 for x in sums], [x is None for x in sums], parts)


def load_reward_functions(config: RewardFunctionFlags, flag: str = "--reward_fn") -> UserReward | None:
    """Returns the functions of --reward_fn, None if there are none. A file with several of them runs once.

    flag: another one that names functions.
    """
    modules: dict[str, ModuleType] = {}
    specs = getattr(config, flag.removeprefix("--"))
    names = [spec.rpartition(":")[2] for spec in specs]
    weights = config.reward_fn_weights if flag == "--reward_fn" else []
    functions = []
    for i, (spec, name) in enumerate(zip(specs, names, strict=True)):
        label = f"{flag} {spec}" if len(names) > 1 else flag
        metric = f"reward_{name}" + f"_{names[: i + 1].count(name)}" * (names.count(name) > 1)
        weight = weights[i] if weights else 1.0
        function = load_function(spec, flag, "my_scores.py:length", modules)
        functions.append(RewardFunction(function, label, metric, weight))
    return UserReward(functions, config.reward_fn_timeout) if functions else None


def _numbers(values, label: str, count: int) -> Column:
    """Returns a number or None per answer. Raises UserError for anything else."""
    try:
        numbers = [None if value is None else float(value) for value in values]
    except (OverflowError, TypeError, ValueError):
        raise UserError(f"{label} must return a list of numbers, one per answer") from None
    if len(numbers) != count:
        raise UserError(f"{label} returned {len(numbers)} numbers for {count} answers; return one per answer")
    return numbers


def _sum(numbers: tuple[float | None, ...]) -> float | None:
    """Returns the sum, None if one of the numbers is."""
    return None if None in numbers else sum(numbers)
