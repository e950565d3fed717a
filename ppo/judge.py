"""Asks a language model which of two answers is better: prompt, replies in a file, verdicts."""

import asyncio
import hashlib
import json
import os
import re
import time
import unicodedata
from contextlib import AbstractContextManager, nullcontext
from itertools import combinations
from pathlib import Path
from typing import IO

import numpy

from ppo.judge_flags import JudgeFlags
from ppo.judge_server import JudgeServer, RefusedError
from reward.win_rate import wilson_interval
from utils.errors import UserError
from utils.files import check_output_file, disk_errors, parse_json, read_bytes
from utils.optional import check_openai
from utils.schema import Count, Schema, Sha256, checked

VERDICTS = {"A": 1.0, "B": 0.0, "C": 0.5}  # score of the answer that is shown first
UNREADABLE = 0.2  # share of replies without a verdict above which the result would be worthless
FEW, SURE = 20, 0.999  # from so many replies on, and at this level, that share is judged while others are asked for
_PLACES = re.compile(r"\{(prompt|answer_a|answer_b)\}")
_VERDICT = re.compile(r"(?:[^\[\]]*\[\[([ABC])\]\]|([ABC]))[.。]?")
_START = b'{"key": "'  # of each line of the file


class _UnreadableError(UserError):
    """Too many replies without a verdict: the same request would get them again."""


class _Reply(Schema):
    """A line of --judge_cache."""

    key: Sha256
    reply: str
    prompt_tokens: Count
    completion_tokens: Count


def read_prompt(name: str) -> str:
    """Returns the text of --judge_prompt: en, zh or a file. Raises UserError if it lacks a place."""
    file = Path(__file__).with_name(f"judge_prompt_{name}.txt") if name in ("en", "zh") else name
    try:
        text = read_bytes(file, 1 << 20).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"--judge_prompt {name}: not readable ({error}); pass en, zh or a text file") from error
    if wrong := [x for x in ("prompt", "answer_a", "answer_b") if _PLACES.findall(text).count(x) != 1]:
        raise UserError(f"--judge_prompt {name} must contain {{{wrong[0]}}} once; see ppo/judge_prompt_en.txt")
    return text


def dialogue_text(turns: list[dict]) -> str:
    """Returns a prompt as the judge reads it: the user's words alone, or all turns with their roles."""
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"[{turn['role']}]\n{turn['content']}" for turn in turns)


def fill_prompt(template: str, prompt: str, first: str, second: str) -> str:
    """Returns what the judge is asked. Each text stands between two lines with a code.

    No text can contain the code, which is a hash of all three. What looks like a place inside a text stays text.
    """
    code = hashlib.sha256(json.dumps([prompt, first, second]).encode()).hexdigest()[:16]
    texts = {"prompt": prompt, "answer_a": first, "answer_b": second}
    return _PLACES.sub(lambda found: f"BEGIN {code}\n{texts[found[1]]}\nEND {code}", template)


def verdict(reply: str) -> float | None:
    """Returns the score of the first answer (VERDICTS), None if the last line of the reply is no verdict."""
    lines = unicodedata.normalize("NFKC", reply).strip().splitlines()  # full-width letters become plain ones
    found = _VERDICT.fullmatch(lines[-1].strip()) if lines else None
    return VERDICTS[found[1] or found[2]] if found else None


class Judge:
    """The model at --judge_url. replies: what it said so far, by the hash of all that matters.

    unreadable: those without a verdict. unasked: how many a budget has left out.
    """

    def __init__(self, config: JudgeFlags):
        self.config, self.template, self.file = config, read_prompt(config.judge_prompt), config.judge_cache_file
        self.requests = self.cached = self.unasked = self.refused = self.prompt_tokens = self.completion_tokens = 0
        self.replies: dict[str, str] = {}
        self.unreadable: list[str] = []
        if self.file:
            check_output_file(self.file, "--judge_cache")
            self.replies = _read_replies(self.file)
        check_openai("--judge_url")
        if not self.replies:  # else perhaps nothing is left to ask
            asyncio.run(self._look())

    def ask_pairs(self, prompts: list[str], answers: list[list[str]]) -> dict[tuple[int, int], numpy.ndarray]:
        """Returns (policy i, policy j > i) -> verdicts as `judge_statistics.outcomes` reads them, NaN for none.

        answers: a list per policy. Same answers are not sent. Raises UserError if the server fails, or if more than
        UNREADABLE of its replies are no verdicts; the file keeps what it replied.
        """
        pairs, places, texts = list(combinations(range(len(answers)), 2)), [], []
        for row, (prompt, *said) in enumerate(zip(prompts, *answers, strict=True)):  # a budget ends between prompts
            for (i, j), order in (
                (pair, order) for pair in pairs for order in (0, 1) if said[pair[0]] != said[pair[1]]
            ):
                places.append((i, j, row, order))
                texts.append(fill_prompt(self.template, prompt, said[(i, j)[order]], said[(j, i)[order]]))
        verdicts = {pair: numpy.full((len(prompts), 2), numpy.nan) for pair in pairs}
        for (i, j, row, order), reply in zip(places, self._ask(texts), strict=True):
            score = None if reply is None else verdict(reply)
            verdicts[i, j][row, order] = numpy.nan if score is None else score
        return verdicts

    def _ask(self, texts: list[str]) -> list[str | None]:
        """Returns the reply to each text; None after the end of a budget."""
        named = [self.config.judge_url, self.config.judge_model, self.config.judge_fields]
        keys = [hashlib.sha256(json.dumps([*named, text], sort_keys=True).encode()).hexdigest() for text in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self.replies}
        self.cached = len(set(keys)) - len(missing)
        if missing:
            try:
                asyncio.run(self._ask_all(missing))
            except UserError as error:
                if not self.file or isinstance(error, _UnreadableError):
                    raise
                kept = f"{self.file} keeps {len(self.replies) - self.refused} replies: run again to go on"
                raise UserError(f"{error}; {kept}") from error
        known = [self.replies[key] for key in dict.fromkeys(keys) if key in self.replies]
        self.unasked = len(set(keys)) - len(known)
        self.unreadable = [reply for reply in known if verdict(reply) is None]
        self._check_readable(len(known), len(self.unreadable) / max(1, len(known)))
        return [self.replies.get(key) for key in keys]

    def _check_readable(self, count: int, share: float) -> None:
        """Raises UserError if this share of replies without a verdict is too high. count: of all replies."""
        if share > UNREADABLE:
            raise _UnreadableError(
                f"--judge_model {self.config.judge_model}: {len(self.unreadable)} of {count} replies have no verdict "
                f"in their last line, the first one: {self.unreadable[0][-400:]!r}; change --judge_prompt or "
                "--judge_arguments (max_tokens)"
            )

    async def _look(self) -> None:
        async with JudgeServer(self.config) as server:
            await server.look()

    async def _ask_all(self, texts: dict[str, str]) -> None:
        """Adds the replies to `replies` until a budget ends. After an error, what is under way is still waited for."""
        waiting, errors, done, shown = iter(texts.items()), [], 0, time.monotonic()

        async def work(server: JudgeServer, file: IO[str] | None) -> None:
            nonlocal done, shown
            try:
                for key, text in waiting:
                    if errors or self._is_spent():
                        return
                    await self._ask_one(key, text, server, file)
                    done += 1
                    if verdict(self.replies[key]) is None:
                        self.unreadable.append(self.replies[key])
                    if done >= FEW:
                        self._check_readable(done, wilson_interval(len(self.unreadable), done, SURE)[1])
                    if time.monotonic() > shown + 30:
                        shown = time.monotonic()
                        print(f"judge: {done} of {len(texts)} replies", flush=True)
            except UserError as error:
                errors.append(error)

        with self._open() as file:
            async with JudgeServer(self.config) as server, asyncio.TaskGroup() as group:
                for _ in range(self.config.judge_parallel):
                    group.create_task(work(server, file))
        if errors:
            raise errors[0]

    def _open(self) -> AbstractContextManager[IO[str] | None]:
        if not self.file:
            return nullcontext()
        with disk_errors(f"--judge_cache {self.file}"):
            os.makedirs(os.path.dirname(os.path.abspath(self.file)), exist_ok=True)
            return open(self.file, "a", encoding="utf-8")

    async def _ask_one(self, key: str, text: str, server: JudgeServer, file: IO[str] | None) -> None:
        """Adds a reply to `replies` and to the file. The server's refusal of this text is a reply without a verdict."""
        config = self.config
        self.requests += 1
        try:
            row = {"key": key} | await server.reply(text)
        except RefusedError as error:
            self.replies[key], self.refused = str(error), self.refused + 1  # not in the file: to be asked again
            return
        self.replies[key] = row["reply"]
        self.prompt_tokens += row["prompt_tokens"]
        self.completion_tokens += row["completion_tokens"]
        if file:
            with disk_errors(f"--judge_cache {self.file}"):
                file.write(json.dumps(row) + "\n")
                file.flush()
        counted = "judge_max_tokens" if config.judge_max_tokens else "judge_price" if config.judge_price else ""
        if counted and not row["prompt_tokens"]:
            where = f"the server at --judge_url {config.judge_url} does not say how many tokens a request had"
            raise UserError(f"--{counted}: {where}; leave --{counted} out, or set --judge_max_requests instead")

    def _is_spent(self) -> bool:
        most, tokens = self.config.judge_max_requests, self.config.judge_max_tokens
        return 0 < most <= self.requests or 0 < tokens <= self.prompt_tokens + self.completion_tokens


def _read_replies(file: str) -> dict[str, str]:
    """Returns the replies of --judge_cache by their keys. Cuts off a line that a killed run has not finished."""
    if not os.path.lexists(file):
        return {}
    try:
        content, replies = read_bytes(file), {}
    except OSError as error:
        raise UserError(f"--judge_cache {file}: not readable ({error}); pass another file") from error
    *lines, last = content.split(b"\n")
    if not _START.startswith(last[: len(_START)]):  # not ours: never cut
        lines.append(last)
    for number, line in enumerate(lines, start=1):
        try:
            row = checked(_Reply, parse_json(line.decode()))
        except ValueError as error:
            raise UserError(
                f"--judge_cache {file}:{number} is no reply of a judge ({error}); remove that line or pass another file"
            ) from error
        replies[row.key] = row.reply
    if last:
        with disk_errors(f"--judge_cache {file}"):
            os.truncate(file, len(content) - len(last))
    return replies
