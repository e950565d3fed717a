"""utils/launch.sh runs on the GPUs that the user was given; utils/launcher.py passes signals on and exit codes back.

And help and wrong flags are quick.
"""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tests.helpers.tiny_run import REPOSITORY, clean_environment

EIGHT = "\n".join(f"GPU {i}: NVIDIA A100-SXM4-80GB (UUID: GPU-{i}d5c)" for i in range(8))
SLICED = "GPU 0: NVIDIA H100 (UUID: GPU-5e)\n  MIG 3g.40gb     Device  0: (UUID: MIG-a1)\n"
SCRIPT = """
set -euo pipefail
source utils/launch.sh
NUM_GPUS=${NUM_GPUS:-$(count_gpus)}
use_devices "$NUM_GPUS"
launch "$LOG" -m sft.train --lr 1
"""
WORDS = "-m sft.train --lr 1"
ONE, MANY = f"python {WORDS}", "python -m utils.launcher {} " + WORDS
HOSTS = f"python -m utils.launcher --hostfile h 8 {WORDS}"
PDSH = "deepspeed --num_gpus 8 --hostfile h --log_level warning --module sft.train --lr 1"
LOCAL = "deepspeed --include localhost:4,5,6 --module sft.train --lr 1"
TORCH = "torchrun --nproc_per_node 8 --signals_to_handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
TORCH_NODE = f"{TORCH} --nnodes 2 --node_rank 1 --master_addr a --master_port 29500 {WORDS}"
SRUN = "srun --export=ALL --input=none --kill-on-bad-exit=0 --wait=60"
# What sbatch of Slurm 22.05 sets with --nodes=2 --gpus-per-node=8 --cpus-per-task=64, and with a task per GPU
BATCH = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_CPUS_PER_NODE": "64(x2)"}
TASKS = BATCH | {"SLURM_NTASKS": "16", "SLURM_TASKS_PER_NODE": "8(x2)", "SLURM_CPUS_PER_TASK": "8"}
STEP = TASKS | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}
SHELL = BATCH | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}  # srun --pty bash
SALLOC = TASKS | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}  # its shell may be a step of this number


@pytest.fixture
def launched(tmp_path):
    """The command line that a recipe runs, with DS_ACCELERATOR, CUDA_VISIBLE_DEVICES and threads of its environment."""
    programs = tmp_path / "bin"
    programs.mkdir()
    say = '#!/bin/sh\necho {} "$@"; echo "${{DS_ACCELERATOR-}} $CUDA_VISIBLE_DEVICES"; echo $OMP_NUM_THREADS\n'
    (programs / "pdsh").touch(0o755)

    def run(listing: str | None, **settings: str) -> tuple[str, str]:
        scripts = {name: say.format(name) for name in ("python", "deepspeed", "torchrun", "srun")}
        if listing is not None:
            scripts["nvidia-smi"] = f"#!/bin/sh\nprintf '%s\\n' '{listing}'\n"
        for name, text in scripts.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        unset = ("CUDA_VISIBLE_DEVICES", "DS_", "MASTER_", "NUM_GPUS", "HOSTFILE", "LAUNCHER", "SLURM_", "RANK")
        environment = {key: value for key, value in os.environ.items() if not key.startswith(unset)}
        (tmp_path / "h").write_text("a slots=8\nb slots=8\n")
        environment |= {"PATH": f"{programs}:/usr/bin:/bin", "LOG": str(tmp_path / "log")} | settings
        if "HOSTFILE" in settings:
            environment["HOSTFILE"] = str(tmp_path / settings["HOSTFILE"])
        command = ["bash", "-c", SCRIPT]
        result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        assert result.returncode == (0 if result.stdout else 2)
        return tuple((result.stdout or result.stderr).replace(f"{tmp_path}/", "").splitlines())

    return run


@pytest.mark.parametrize(
    ("listing", "settings", "command", "devices"),
    [
        (None, {}, ONE, "cpu "),
        (EIGHT, {}, MANY.format(8), " "),
        (EIGHT, {"CUDA_VISIBLE_DEVICES": "4,5,6,7", "NUM_GPUS": "2"}, MANY.format(2), " 4,5,6,7"),
        (EIGHT, {"CUDA_VISIBLE_DEVICES": "GPU-3d5c,GPU-08"}, MANY.format(2), " GPU-3d5c,GPU-08"),
        (SLICED, {"CUDA_VISIBLE_DEVICES": "MIG-a1"}, ONE, " MIG-a1"),
        (EIGHT, {"CUDA_VISIBLE_DEVICES": "0,8,1"}, ONE, " 0,8,1"),  # CUDA stops at what is not there
        (EIGHT, {"CUDA_VISIBLE_DEVICES": "-1"}, ONE, "cpu -1"),
        (EIGHT, {"CUDA_VISIBLE_DEVICES": ""}, ONE, "cpu "),
        (EIGHT, {"NUM_GPUS": "0"}, ONE, "cpu "),
        (EIGHT, {"HOSTFILE": "h"}, HOSTS, " "),
        (EIGHT, {"HOSTFILE": "h", "LAUNCHER": "deepspeed"}, PDSH, " "),
        (
            EIGHT,
            {"HOSTFILE": "h", "LAUNCHER": "deepspeed", "MASTER_PORT": "5"},
            PDSH.replace("h --l", "h --master_port 5 --l"),
            " ",
        ),
        (EIGHT, {"LAUNCHER": "deepspeed", "CUDA_VISIBLE_DEVICES": "4,5,6"}, LOCAL, " 4,5,6"),
        (EIGHT, {"LAUNCHER": "none"}, ONE, " "),
        (EIGHT, {"LAUNCHER": "own", "NUM_GPUS": "1"}, MANY.format(1), " "),
        (EIGHT, {"LAUNCHER": "torchrun"}, f"{TORCH} --standalone {WORDS}", " "),
        (EIGHT, {"LAUNCHER": "torchrun", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a"}, TORCH_NODE, " "),
        (None, BATCH, f"{SRUN} --ntasks-per-node=8 --ntasks=16 --cpus-per-task=8 --overcommit {ONE}", " "),
        (None, BATCH | {"LAUNCHER": "none"}, ONE, " "),
        (None, TASKS, f"{SRUN} --cpus-per-task=8 {ONE}", " "),
        (None, SALLOC, f"{SRUN} --cpus-per-task=8 {ONE}", " "),
        (EIGHT, STEP, ONE, " "),
        (EIGHT, STEP | {"SLURM_STEP_TASKS_PER_NODE": "1(x16)", "LAUNCHER": "own"}, MANY.format(8), " "),
        (EIGHT, SHELL, MANY.format(8), " "),
        (EIGHT, BATCH | {"HOSTFILE": "h"}, HOSTS, " "),
    ],
)
def test_the_gpus_that_were_given_are_those_that_are_used(launched, listing, settings, command, devices):
    assert launched(listing, **settings)[:2] == (command, devices)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"LAUNCHER": "mpirun"}, "error: LAUNCHER=mpirun: set it to auto, own, deepspeed, torchrun, srun or none"),
        ({"LAUNCHER": "torchrun", "NNODES": "2"}, "error: LAUNCHER=torchrun: NNODES=2 needs NODE_RANK"),
        ({"LAUNCHER": "torchrun", "NNODES": "two"}, "error: NNODES=two: not a number"),
        ({"LAUNCHER": "srun", "HOSTFILE": "h"}, "error: HOSTFILE=h: LAUNCHER=srun does not read it"),
        ({"SLURM_JOB_ID": "7"}, "error: NUM_GPUS: srun does not tell it"),  # the one here does not run anything
    ],
)
def test_a_launcher_that_cannot_be_used(launched, settings, error):
    (line,) = launched(EIGHT, **settings)
    assert line.startswith(error)


@pytest.mark.parametrize(
    ("settings", "threads"),
    [(BATCH, 8), (TASKS, 8), (STEP | {"NUM_GPUS": "1"}, 8), (BATCH | {"NUM_GPUS": "2"}, 32), (SHELL, 8)],
)
def test_threads_are_those_of_the_allocation(launched, settings, threads):
    """64 CPUs of a node, whatever this machine has."""
    assert launched(EIGHT, **settings, OMP_NUM_THREADS="")[2] == str(threads)


def test_a_hostfile_that_cannot_be_used(launched, tmp_path):
    """It is missing, there are no GPUs, or the program that reaches several machines is."""
    assert "there is no such file" in launched(EIGHT, HOSTFILE="nowhere")[0]
    assert "NUM_GPUS is 0" in launched(EIGHT, HOSTFILE="h", NUM_GPUS="0")[0]
    for program in Path("/usr/bin").iterdir():
        if program.name != "pdsh":
            (tmp_path / program.name).symlink_to(program)
    (tmp_path / "bin" / "pdsh").unlink()
    path = f"{tmp_path}/bin:{tmp_path}"
    assert "pdsh, which is not installed" in launched(EIGHT, HOSTFILE="h", LAUNCHER="deepspeed", PATH=path)[0]


@pytest.mark.parametrize(
    ("words", "start", "code"),
    [
        ("run_en.sh --seed 3 --help lr", "--lr FLOAT", 0),
        ("reward/run.sh --help lr", "--lr FLOAT", 0),
        ("run_en.sh --reward_fn f.py:f", "error: these paths do not exist", 1),
    ],
)
def test_recipes_answer_without_models(words, start, code):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_MODEL")} | {"PATH": path}
    shown = subprocess.run(["bash", *words.split()], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert shown.returncode == code and (shown.stdout or shown.stderr).startswith(start)
    assert code == 0 or ("CRITIC_MODEL= (with --reward_fn" in shown.stderr and "  REWARD_MODEL" not in shown.stderr)


def hear_signals() -> None:
    """In a process about to start: these signals are not ignored, even if the tests run under nohup or behind a `&`."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def start_ranks(file: Path, code: str, *, patience: float = 30.0, **environment: str) -> subprocess.Popen:
    """Two ranks of a script, whose launcher has this patience."""
    here = f"rank, here = os.environ['RANK'], {str(file.parent)!r}"
    file.write_text(f"import os, pathlib, signal, sys, time\n{here}\n{code}")
    start = f"import sys, utils.launcher as r; r.PATIENCE = {patience}; sys.exit(r.main(['2', {str(file)!r}]))"
    options = {"cwd": REPOSITORY, "env": clean_environment() | environment, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", start], preexec_fn=hear_signals, **options)


SAVES = """
def save(number, frame):
    time.sleep(1)
    print('saved', number)
    pathlib.Path(here, f"saved {rank}").touch()
    sys.exit(128 + number)

for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
    signal.signal(signal.Signals[name], save)
pathlib.Path(here, f"started {rank}").touch()
time.sleep(60)
"""


def when_started(folder: Path, ranks: int) -> None:
    while len(list(folder.glob("started *"))) < ranks:
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_reaches_all_ranks_which_have_all_the_time_they_need(tmp_path, number):
    launcher = start_ranks(tmp_path / "rank.py", SAVES, patience=0.3)
    when_started(tmp_path, 2)
    launcher.send_signal(number)
    assert launcher.wait(timeout=20) == 128 + number
    assert {path.name for path in tmp_path.glob("saved *")} == {"saved 0", "saved 1"}


@pytest.mark.parametrize(("number", "group"), [(signal.SIGTERM, False), (signal.SIGINT, True), (signal.SIGHUP, True)])
def test_a_recipe_waits_until_the_run_has_saved(tmp_path, number, group):
    """Whether the script alone gets the signal or, as by Ctrl-C, its process group: the run gets it once."""
    run = tmp_path / "run.py"
    run.write_text(f"import pathlib, signal, sys, time\nrank, here = 0, {str(tmp_path)!r}\n{SAVES}")
    script = f"set -euo pipefail; source utils/launch.sh; NUM_GPUS=1; launch {tmp_path}/log {run}; echo not reached"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shell = subprocess.Popen(
        ["bash", "-c", script], cwd=REPOSITORY, env=clean_environment() | {"PATH": path}, stdout=subprocess.PIPE,
        text=True, start_new_session=True, preexec_fn=hear_signals,
    )  # fmt: skip
    when_started(tmp_path, 1)
    (os.killpg if group else os.kill)(shell.pid, number)
    output, _ = shell.communicate(timeout=20)
    assert shell.returncode == 128 + number
    assert output == (tmp_path / "log").read_text() == f"saved {number}\n"


@pytest.mark.parametrize(
    ("launcher", "sent", "received"),
    [
        ("srun", "TERM", "USR1"),
        ("srun", "INT INT", "USR1 TERM"),
        ("torchrun", "USR2", "USR2"),
        ("deepspeed", "HUP", "TERM"),
    ],
)
def test_each_launcher_gets_a_signal_upon_which_it_lets_ranks_save(tmp_path, launcher, sent, received):
    """srun kills them upon SIGTERM: only a second Ctrl-C becomes one."""
    code = f"""#!{sys.executable}
import os, signal, time
seen = []
def note(number, frame):
    seen.append(number)
    os.write(1, signal.Signals(number).name.encode() + b"\\n")
for number in (1, 2, 10, 12, 15):
    signal.signal(number, note)
print("up", flush=True)
while len(seen) < {len(sent.split())}:
    time.sleep(0.01)
"""
    (tmp_path / launcher).write_text(code)
    (tmp_path / launcher).chmod(0o755)
    script = f"source utils/launch.sh; NUM_GPUS=1 LAUNCHER={launcher}; launch /dev/null run.py --ignore_hangup False"
    shell = subprocess.Popen(
        ["bash", "-c", script], cwd=REPOSITORY, env=clean_environment() | {"PATH": f"{tmp_path}:/usr/bin:/bin"},
        stdout=subprocess.PIPE, text=True, preexec_fn=hear_signals,
    )  # fmt: skip
    assert shell.stdout.readline() == "up\n"
    for own, passed_on in zip(sent.split(), received.split(), strict=True):
        shell.send_signal(signal.Signals[f"SIG{own}"])
        assert shell.stdout.readline() == f"SIG{passed_on}\n"
    assert shell.wait(timeout=20) == 0


def test_a_recipe_goes_on_when_nobody_reads_its_output(tmp_path):
    """Its own lines do not end it, nor those of the run."""
    run = tmp_path / "run.py"
    run.write_text("print('a line of the run', flush=True)")
    script = f"set -euo pipefail; source utils/launch.sh; NUM_GPUS=0; echo one; launch {tmp_path}/log {run}; echo two"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", "-c", f"bash -c '{script}; exit 3' | sleep 0; echo ${{PIPESTATUS[0]}}"]
    shell = subprocess.run(
        command, cwd=REPOSITORY, env=clean_environment() | {"PATH": path}, capture_output=True, text=True, timeout=30
    )
    assert (shell.stdout, shell.stderr) == ("3\n", "")
    assert (tmp_path / "log").read_text() == "a line of the run\n"


@pytest.mark.parametrize(
    ("end", "code"), [("sys.exit(75)", 75), ("sys.exit(2)", 2), ("os.kill(os.getpid(), signal.SIGKILL)", 137)]
)
def test_the_first_failure_is_the_exit_code_and_ends_the_others(tmp_path, end, code):
    started = time.monotonic()
    launcher = start_ranks(tmp_path / "rank.py", f"if rank == '1': {end}\ntime.sleep(60)", patience=0.3)
    assert launcher.wait(timeout=20) == code
    assert time.monotonic() - started < 15


def on_a_node(folder: Path, code: str, **environ: str) -> subprocess.Popen:
    """The launcher of the second of two machines, as the first one starts it by ssh; its input is still open."""
    (folder / "rank.py").write_text(f"import os, pathlib, signal, sys, time\nhere = {str(folder)!r}\n{code}")
    ranks = {"count": 2, "command": [f"{folder}/rank.py"], "address": "n1", "port": "5000", "nodes": 2, "node": 1}
    node = subprocess.Popen(
        [sys.executable, "-m", "utils.launcher", "--node"], cwd=REPOSITORY, env=clean_environment(),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=hear_signals,
    )  # fmt: skip
    node.stdin.write(json.dumps({"environ": environ, "ranks": ranks}).encode() + b"\n")
    node.stdin.flush()
    return node


@pytest.mark.parametrize(("number", "saved"), [(signal.SIGTERM, signal.SIGTERM), (None, signal.SIGUSR1)])
def test_ranks_of_another_machine_save_when_they_are_told_to_or_the_first_machine_is_gone(tmp_path, number, saved):
    node = on_a_node(tmp_path, f"rank = os.environ['RANK']{SAVES}")
    when_started(tmp_path, 2)
    if number:
        node.stdin.write(f"{int(number)}\n".encode())
        node.stdin.flush()
    else:
        node.stdin.close()
    assert node.wait(timeout=20) == 128 + saved
    assert {path.name for path in tmp_path.glob("saved *")} == {"saved 2", "saved 3"}


@pytest.mark.parametrize(
    ("hosts", "address", "error"),
    [
        (["localhost", "b"], None, "as localhost; write its name"),
        (["me@127.0.0.1", "b"], None, "as 127.0.0.1; write its name"),
        (["localhost", "b"], "a", ""),
        (["localhost"], None, ""),
        (["a", "localhost"], None, ""),
    ],
)
def test_the_first_machine_of_several_has_an_address_for_the_others(tmp_path, hosts, address, error):
    """And variables of this machine, its sessions and jobs stay here: the `ssh` of this test keeps what is sent."""
    (tmp_path / "hosts").write_text("".join(f"{host} slots=1\n" for host in hosts))
    (tmp_path / "ssh").write_text("#!/bin/sh\nhead -n 1 >$0.$$\n")
    (tmp_path / "ssh").chmod(0o755)
    given = {"PATH": f"{tmp_path}:/usr/bin:/bin", "TMPDIR": "/tmp", "XDG_RUNTIME_DIR": "/run/user/0", "PMI_RANK": "0"}
    given |= {"CUDA_VISIBLE_DEVICES": "0,1"} | ({"MASTER_ADDR": address} if address else {})
    command = [sys.executable, "-m", "utils.launcher", "--hostfile", str(tmp_path / "hosts"), "1", "run.py"]
    environment = clean_environment() | given
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=20)
    assert result.returncode == (2 if error else 0) and result.stderr.strip().endswith(error)
    assert result.stderr.count("\n") == (1 if error else 0)
    orders = [json.loads(sent.read_text()) for sent in tmp_path.glob("ssh.*")]
    assert len(orders) == (0 if error else len(hosts))
    for order in orders:
        assert order["ranks"]["address"] == (address or hosts[0])
        assert given.keys() & order["environ"].keys() == given.keys() - {"TMPDIR", "XDG_RUNTIME_DIR", "PMI_RANK"}


def test_ranks_of_another_machine_have_their_places_and_the_environment_of_the_first(tmp_path):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TEXT")
    node = on_a_node(tmp_path, f"os.write(1, repr([os.environ[n] for n in {names}]).encode() + b'\\n')", TEXT='a"$b\n')
    lines = sorted(node.stdout.read().decode().splitlines())
    assert node.wait(timeout=20) == 0
    assert lines == [repr([str(2 + i), str(i), "4", "2", "n1", "5000", 'a"$b\n']) for i in range(2)]


def test_deepspeed_gets_a_file_of_variables_which_is_removed(tmp_path):
    """Only its owner can read it. The shells of other machines evaluate values between double quotes."""
    values = {"WANDB_API_KEY": "a \"b\" $HOME `c` %n \\ ; 'd'\ne é", "NCCL_DEBUG": "x", "USER_NAME": "not passed on"}
    values |= {"HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": "0", "DS_ACCELERATOR": "cpu"}
    (tmp_path / ".deepspeed_env").write_text("# own ones\nNCCL_DEBUG=INFO\n\nOWN=1\n")
    (tmp_path / "hosts").touch()
    (tmp_path / "deepspeed").write_text(f"#!/bin/sh\nstat -c '%a %n' $DS_ENV_FILE\ncp $DS_ENV_FILE {tmp_path}/copy\n")
    (tmp_path / "deepspeed").chmod(0o755)
    script = "source utils/launch.sh; NUM_GPUS=1; launch /dev/null -m sft.train"
    environment = clean_environment() | values | {"PATH": f"{tmp_path}:/usr/bin:/bin", "LAUNCHER": "deepspeed"}
    run = partial(subprocess.run, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    said = run(["bash", "-uc", script], env=environment | {"HOSTFILE": f"{tmp_path}/hosts"})
    mode, path = said.stdout.split()
    assert mode == "600" and not Path(path).exists()
    seen = {}
    for line in (tmp_path / "copy").read_text().splitlines():
        name, value = line.split("=", 1)
        seen[name] = run(["sh", "-c", f'printf %s "{value}"']).stdout
    assert seen.items() >= {"WANDB_API_KEY": values["WANDB_API_KEY"], "NCCL_DEBUG": "INFO", "OWN": "1"}.items()
    assert seen["PATH"] == environment["PATH"] and seen["DS_ACCELERATOR"] == "cpu"
    assert not {"USER_NAME", "HOME", "CUDA_VISIBLE_DEVICES", "DS_ENV_FILE"} & seen.keys()


def test_each_run_has_a_port_of_its_own_unless_one_is_given(tmp_path):
    """Two ranks agree, and two runs at once do not."""
    names = ("MASTER_PORT", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    say = f"os.write(1, ' '.join(os.environ[name] for name in {names}).encode() + b'\\n')"  # a line in one piece
    (tmp_path / "other").mkdir()
    runs = [start_ranks(tmp_path / name, say) for name in ("rank.py", "other/rank.py")]
    ports = []
    for run in runs:
        lines = sorted(line.split() for line in run.communicate(timeout=20)[0].splitlines())
        assert [line[1:] for line in lines] == [["0", "2", "2"], ["1", "2", "2"]]
        ports.append({line[0] for line in lines})
    assert len(ports[0]) == len(ports[1]) == 1 and ports[0] != ports[1]
    given = start_ranks(tmp_path / "rank.py", say, MASTER_PORT="5000").communicate(timeout=20)[0]
    assert [line.split()[0] for line in given.splitlines()] == ["5000", "5000"]
