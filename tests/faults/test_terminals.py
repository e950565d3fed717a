"""What a run is started from goes away: its terminal, the reader of its output, its launcher."""

import fcntl
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest

from tests.faults.scenarios import finished, run_cases
from tests.helpers.tiny_run import REPOSITORY, Inputs, assert_same_run, clean_environment, read_metrics, run_flags

FLAGS = {"train_steps": 3, "checkpoint_per_step": 1, "num_eval_prompts": 0, "keep_checkpoints": 3}
LAUNCHERS = {
    "ours": ["-m", "utils.launcher", "2", "train_ppo.py"],
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "train_ppo.py"],
}
# Scores as `vowels` does, but on each rank from its second call on without an end, unless there is a file `go`.
WAITS = """
import os, time
from pathlib import Path

here, calls = Path(__file__).parent, []

def score(prompts, answers):
    calls.append(1)
    if len(calls) == 2:
        (here / f"rank{os.environ['RANK']}").write_text(str(os.getpid()))
    while len(calls) > 1 and not (here / "go").exists():
        time.sleep(0.05)
    return [sum(letter in "aeiou" for letter in answer) / (1 + len(answer)) for answer in answers]
"""


def environment() -> dict[str, str]:
    own = {key: value for key, value in clean_environment().items() if key not in ("TMUX", "STY")}
    return own | {"DS_ACCELERATOR": "cpu", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def until(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it has not come about"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "score.py").write_text(WAITS)
    (folder / "go").touch()
    scores = {"reward_fn": f"{folder}/score.py:score"}
    return finished(run_cases(folder, inputs, {"one": FLAGS | {"ranks": 1}, "two": FLAGS | scores}))


@pytest.mark.slow
def test_a_run_whose_output_nobody_reads_goes_on(inputs, tmp_path, undisturbed):
    """Alone, and as a recipe, whose log goes on too."""
    run, recipe = (shlex.join(run_flags(inputs, tmp_path / name, **FLAGS)) for name in ("run", "recipe"))
    script = (
        f"python train_ppo.py {run} 2>&1 | head -n 1; codes=${{PIPESTATUS[0]}}; source utils/launch.sh; NUM_GPUS=0; "
        f"launch {tmp_path}/log train_ppo.py {recipe} 2>&1 | head -n 1; echo $codes ${{PIPESTATUS[0]}}"
    )
    shell = subprocess.run(["bash", "-c", script], cwd=REPOSITORY, env=environment(), capture_output=True, text=True)
    assert (len(shell.stdout.splitlines()), shell.stdout.splitlines()[-1]) == (3, "0 0"), shell.stdout
    assert "Traceback" not in (tmp_path / "log").read_text() and "step 3/3" in (tmp_path / "log").read_text()
    assert_same_run(tmp_path / "run", undisturbed["one"])
    assert_same_run(tmp_path / "recipe", undisturbed["one"])


@pytest.mark.parametrize(("ignore", "code"), [pytest.param("true", 0, marks=pytest.mark.slow), ("auto", 129)])
def test_a_run_whose_terminal_is_closed(inputs, tmp_path, undisturbed, ignore, code):
    """It saves and ends, or goes on to its end; printing to the terminal fails then."""
    out, (master, slave) = tmp_path / "run", pty.openpty()
    flags = FLAGS if ignore == "true" else FLAGS | {"train_steps": 100000}
    command = [sys.executable, "train_ppo.py", *run_flags(inputs, out, **flags, ignore_hangup=ignore)]

    def begin() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    run = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment(), stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        preexec_fn=begin,
    )  # fmt: skip
    os.close(slave)
    shown = []
    # The header of the table is printed when the first step is complete.
    reader = threading.Thread(target=lambda: shown.append(read_until(master, b"score     KL")))
    reader.start()
    reader.join(120)
    assert shown and run.poll() is None
    os.close(master)
    assert run.wait(timeout=120) == code
    if ignore == "true":
        assert_same_run(out, undisturbed["one"])
    else:
        assert f"step_{len(read_metrics(out))}" in {path.name for path in (out / "checkpoints").iterdir()}


def read_until(handle: int, end: bytes) -> bytes:
    text = b""
    while end not in text:
        text += os.read(handle, 4096)
    return text


@pytest.mark.parametrize("launcher", ["ours", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_ranks_save_and_end_when_their_launcher_is_killed(inputs: Inputs, tmp_path, undisturbed, launcher):
    (tmp_path / "score.py").write_text(WAITS)
    flags = FLAGS | {"reward_fn": f"{tmp_path}/score.py:score"}
    command = [sys.executable, *LAUNCHERS[launcher], *run_flags(inputs, tmp_path / "run", **flags)]
    log, ranks = tmp_path / "log", [tmp_path / f"rank{i}" for i in (0, 1)]
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment(), stdout=file, stderr=file)
    until(lambda: all(rank.exists() and rank.read_text() for rank in ranks))
    process.kill()
    process.wait()
    until(lambda: len(re.findall(r"the launcher, process \d+, has died", log.read_text())) == 2, 10)
    until(
        lambda: not any(Path(f"/proc/{rank.read_text()}/cmdline").read_bytes() for rank in ranks if is_there(rank)), 20
    )
    assert "stopped by SIGUSR1 after step 1; what followed is made again; the same command resumes" in log.read_text()
    (tmp_path / "go").touch()
    after = run_cases(tmp_path, inputs, {"after": flags | {"out": "run"}})
    assert "resuming from" in after["after"].log
    assert_same_run(finished(after)["after"], undisturbed["two"])


def is_there(rank: Path) -> bool:
    return Path(f"/proc/{rank.read_text()}").exists()
