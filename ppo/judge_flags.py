"""Flags of the judge of `python -m ppo.compare`. No torch."""

import os
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from utils.errors import UserError
from utils.files import is_special, parse_json
from utils.flags.checks import check_range
from utils.flags.fields import Common

KEY = "OPENAI_API_KEY"  # the variable with the server's key, which is in no flag and no file


@dataclass
class JudgeFlags:
    """Judge: a language model that says which of two answers is better."""

    judge_url: Common[str | None] = None
    """Server with an OpenAI-compatible interface, as in http://localhost:8000/v1. PROMPTS AND ANSWERS ARE SENT TO IT.
    Its key, if it wants one, is read from the environment: OPENAI_API_KEY"""
    judge_model: Common[str | None] = None
    """Name of the model that judges, as the server knows it"""
    judge_prompt: str = "en"
    """What the judge is asked: en, zh, or a text file with {prompt}, {answer_a} and {answer_b}. The last line of a
    reply must be A, B or C (a tie), or end in [[A]], [[B]] or [[C]]"""
    judge_arguments: str = '{"temperature": 0, "max_tokens": 16}'
    """Other fields of each request, as a JSON object; a judge that explains its verdict needs more tokens"""
    judge_cache: str | None = None
    """JSON-lines file of the judge's replies, which are not asked for again. Default: beside --output, with the ending
    .judge.jsonl; none without --output, or if that is a pipe or a device"""
    judge_parallel: int = 8
    """Requests to the judge at once"""
    judge_timeout: float = 60.0
    """Seconds without a sign of the judge's server after which a request is sent again"""
    judge_retries: int = 4
    """Times that a request is sent again after an error of the server or its rate limit; waits grow from 0.5 to 8
    seconds, or are what the server asks for, up to 2 minutes"""
    judge_max_requests: int = 0
    """Requests to the judge after which no more are sent, and the result is of the answers judged by then. Those that
    are sent again after an error count once. 0: no limit"""
    judge_max_tokens: int = 0
    """Tokens, of prompts and replies together, after which no more requests are sent; 0: no limit"""
    judge_price: list[float] = field(default_factory=list)
    """Prices of a million prompt tokens and of a million tokens of replies: the result then has what the run cost"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(
            self, judge_parallel=(1, 1024), judge_timeout=(0.1, None), judge_retries=(0, 100),
            judge_max_requests=(0, None), judge_max_tokens=(0, None),
        )  # fmt: skip
        if bool(self.judge_url) != bool(self.judge_model):
            given, missing = ("url", "model") if self.judge_url else ("model", "url")
            raise UserError(f"--judge_{given} without --judge_{missing}: a judge needs both")
        if self.judge_url:
            _check_url(self.judge_url)
        elif idle := sorted(name for name in self.given - {"judge_url", "judge_model"} if name.startswith("judge_")):
            raise UserError(f"--{idle[0]} without --judge_url does nothing; leave it out, or pass --judge_url")
        if len(self.judge_price) not in (0, 2) or not all(0 <= price < 1e9 for price in self.judge_price):
            prices = " ".join(f"{price:g}" for price in self.judge_price)
            raise UserError(f"--judge_price {prices}: pass two prices, of a million prompt tokens and of replies")
        _ = self.judge_fields

    @property
    def judge_fields(self) -> dict:
        """--judge_arguments as a dict. Raises UserError if it is not a JSON object, or sets what other flags set."""
        try:
            fields = parse_json(self.judge_arguments)
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            raise UserError(f"--judge_arguments {self.judge_arguments}: pass a JSON object, as in '{{\"seed\": 1}}'")
        if taken := sorted({"model", "messages", "stream", "n"} & fields.keys()):
            raise UserError(f"--judge_arguments has the field {taken[0]}, which is set by this command; leave it out")
        return fields

    @property
    def judge_cache_file(self) -> str | None:
        """--judge_cache, or its default."""
        if self.judge_cache or not self.output or is_special(self.output):
            return self.judge_cache
        return f"{os.path.realpath(self.output).removesuffix('.json')}.judge.jsonl"  # not beside /dev/stdout


def _check_url(url: str) -> None:
    """Raises UserError for what is no plain URL, also if it has a password, which would get into files."""
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        is_url = False
    if not is_url:
        raise UserError(f"--judge_url {url}: pass a URL such as http://localhost:8000/v1")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UserError(f"--judge_url: a user, password or ? has no place in it; put the key into the variable {KEY}")
