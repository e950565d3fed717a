"""Talk to a model: `python -m ppo.chat --model outputs/ppo_en/final [--compare BEFORE] [--reward_model R]`.

In a pipe, each line is a question of one dialogue, and only answers are printed:
echo "Hi" | python -m ppo.chat --model M
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from functools import partial

from ppo.chat_flags import ChatConfig
from utils.flags.parser import entry_point, parse_args


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Answers the lines of standard input until it ends; what is not an answer goes to standard error."""
    out = getattr(sys.stdout, "raw", sys.stdout)  # colours pass; the screen escapes what it writes
    with contextlib.redirect_stdout(sys.stdout if {"-h", "--help"} & {*argv} else sys.stderr):
        config = parse_args(ChatConfig, argv)
    from ppo.chat_models import ChatModels
    from ppo.chat_screen import Screen
    from ppo.chat_session import Session

    screen = Screen(out, sys.stdin.isatty() and out.isatty())
    try:
        with contextlib.redirect_stdout(sys.stderr):
            session = Session(ChatModels(config, partial(print, flush=True)), screen)
        for where, line in _typed() if screen.is_terminal else _piped():
            session.handle(where, line)
            if session.is_over:
                break
    except BrokenPipeError:  # the reader has closed the pipe (`| head`); do not flush to it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())


def _typed() -> Iterator[tuple[str, str]]:
    """Yields what the user types."""
    with contextlib.suppress(ImportError):  # of a Python without it
        import readline  # noqa: F401 - gives `input` editing and a history
    sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            line = input("> ")
        except EOFError:  # Ctrl-D
            print()
            return
        except KeyboardInterrupt:
            print()
            raise
        yield "", line


def _piped() -> Iterator[tuple[str, str]]:
    """Yields (place, line) of standard input, without blank lines."""
    from data.formats.json_lines import decode_line, lines_of

    for number, line in lines_of(sys.stdin.buffer, "standard input"):
        yield f"standard input:{number}: ", decode_line(line, "standard input", number)


if __name__ == "__main__":
    main()
