"""An OpenAI-compatible server that is asked for replies: `--judge_url`. The only home of the package `openai`."""

import asyncio
import os

from ppo.judge_flags import KEY, JudgeFlags
from utils.errors import UserError
from utils.files import parse_json
from utils.schema import Count, Schema, checked

REFUSED = (400, 413, 422)  # of one text: too long for the model's window, or stopped by a filter
MAX_WAIT = 120  # seconds: the longest Retry-After that the client honours


class RefusedError(UserError):
    """The server does not take this text; it may take others."""


class _Message(Schema):
    content: str | None = None


class _Choice(Schema):
    message: _Message


class _Usage(Schema):
    prompt_tokens: Count = 0
    completion_tokens: Count = 0


class _Completion(Schema):
    choices: list[_Choice]
    usage: _Usage | None = None


class JudgeServer:
    """The client, to be used in `async with` and one event loop. It sends requests again as the flags say."""

    def __init__(self, config: JudgeFlags):
        import openai

        self.config, self.key, self.library = config, os.environ.get(KEY, "").strip(), openai
        if not self.key.isascii() or not self.key.isprintable():
            raise UserError(f"{KEY} in the environment has characters that no key has; set it again")
        self.client = openai.AsyncOpenAI(
            base_url=config.judge_url, api_key=self.key or "none",  # the client wants one even if the server does not
            timeout=config.judge_timeout, max_retries=config.judge_retries,
        )  # fmt: skip

    async def __aenter__(self) -> "JudgeServer":
        return self

    async def __aexit__(self, *_) -> None:
        await self.client.close()

    async def look(self) -> None:
        """Raises UserError if there is no server, or if it refuses the key: before hours of sampling."""
        try:
            await self.client.with_options(max_retries=0).models.with_raw_response.list()
        except (self.library.APITimeoutError, self.library.APIStatusError) as error:
            if isinstance(error, self.library.AuthenticationError):  # else: not every server lists its models
                raise self._problem(error) from error
        except self.library.APIConnectionError as error:
            raise self._problem(error) from error

    async def reply(self, text: str) -> dict:
        """Returns {"reply": str, "prompt_tokens": int, "completion_tokens": int}. Raises UserError."""
        config, answer = self.config, ""
        # The client's own limit is one of silence: a server that sends a byte now and then would never reach it.
        limit = config.judge_timeout * (config.judge_retries + 1) + MAX_WAIT * config.judge_retries
        try:
            async with asyncio.timeout(limit):
                raw = await self.client.chat.completions.with_raw_response.create(
                    model=config.judge_model,
                    messages=[{"role": "user", "content": text}],
                    extra_body=config.judge_fields,
                )
            answer = raw.text
            found = checked(_Completion, parse_json(answer))
            usage, reply = found.usage or _Usage(), found.choices[0].message.content or ""
        except (self.library.OpenAIError, TimeoutError, ValueError, IndexError) as error:
            raise self._problem(error, answer) from error
        return {"reply": reply} | usage.model_dump()

    def _problem(self, error: Exception, answer: str = "") -> UserError:
        """Returns the error for the user. answer: what came instead of a chat completion."""
        config, status = self.config, getattr(error, "status_code", None)
        said, answer = (  # the key goes first: half of it could be left by the cut
            text.replace(self.key or "\0", "***")[:length]
            for text, length in ((str(error.__cause__ or error), 300), (answer, 200))
        )
        if isinstance(error, (TimeoutError, self.library.APITimeoutError)):
            text = f"no reply within {config.judge_timeout:g} s, asked {config.judge_retries + 1} times; raise "
            text += "--judge_timeout, or lower --judge_parallel"
        elif isinstance(error, self.library.APIConnectionError):
            text = f"cannot be reached ({said}); start the server, or correct the URL"
        elif status in (401, 403):
            text = f"refuses the key{'' if self.key else ', which is missing'}; set {KEY} in the environment ({said})"
        elif status == 404:
            text = f"has no such page, or no model {config.judge_model}; most URLs end in /v1 ({said})"
        elif status == 429:
            text = f"its rate limit is reached; lower --judge_parallel, raise --judge_retries, or wait ({said})"
        elif status:
            text = f"answered with an error ({said})"
        else:
            text = f"what came is no chat completion: {answer!r} ({said}); is it an OpenAI-compatible server?"
        return (RefusedError if status in REFUSED else UserError)(f"--judge_url {config.judge_url}: {text}")
