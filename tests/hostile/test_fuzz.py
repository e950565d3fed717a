"""The fuzzer: a short run finds nothing, and what careless readers do is found."""

import argparse
import os
import time

import pytest

from tests.helpers.tiny_run import run_module
from tests.hostile import fuzz
from tests.hostile.targets import Target
from utils.errors import UserError


def refuse(text: str):
    """A reader that raises a UserError."""

    def read(_) -> None:
        raise UserError(text)

    return read


def fail(error: BaseException):
    """A reader that raises something else."""

    def read(_) -> None:
        raise error

    return read


READERS = {
    "accepts": (str, None),
    "refuses what is sound": (refuse("--a is wrong"), "a sound folder is refused"),
    "an error": (fail(KeyError("a")), "KeyError"),
    "a panic": (fail(BaseException("a")), "BaseException"),
    "two lines": (refuse("a\nb"), "not one line"),
    "no memory, in one line": (refuse("DefaultCPUAllocator: can't allocate memory"), "asks for memory"),
    "ends": (lambda _: os._exit(3), "process ended: 3"),
    "runs code": (lambda _: os.system("touch ran"), "code ran"),
    "writes": (lambda _: open("x", "w").close(), "does open"),
    "takes memory": (lambda _: b"x" * (1 << 29), "GB"),
    "no such memory": (lambda _: bytearray(1 << 40), "MemoryError"),
    "hangs": (lambda _: time.sleep(99), "hung"),
}


@pytest.mark.parametrize("name", READERS)
def test_what_a_reader_does_is_found(name, tmp_path, monkeypatch):
    read, expected = READERS[name]
    monkeypatch.setattr(fuzz, "TARGETS", [Target("policy", "config.json", lambda rng, content: content, read)])
    monkeypatch.setattr(fuzz, "SECONDS", 3 if name == "hangs" else 60)
    monkeypatch.setattr(fuzz, "BYTES", 1 << 28)
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").write_text("{}")
    options = argparse.Namespace(seed=0, start=0, count=2, only=None)
    found = fuzz.run(options, {"policy": tmp_path / "policy"}, tmp_path)
    assert len(found) == (2 if expected else 0)
    assert all(expected in text for text in found.values())


def test_fuzz_briefly():
    result = run_module("tests.hostile.fuzz", "--count", 200, "--seed", 7)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
