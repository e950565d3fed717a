"""A cluster of two nodes, n1 and n2, on this machine: real Slurm, sshd and a network between them, in Linux namespaces.

Each node has its own host name, address, loopback interface, processes and mounts, and all share the files of this
machine. A third one, `head`, runs Slurm's controller and the commands of users. When its first process ends, the kernel
kills all others, those of the nodes included. By hand, for one command:

    python -m tests.helpers.cluster 'srun -N2 hostname; ssh n2 hostname'
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.helpers.tiny_run import clean_environment

NODES = ("n1", "n2")
NETWORK = "198.18.0."  # of the range that is reserved for tests of networks
PROGRAMS = {
    "slurmctld": "slurm-wlm", "munged": "munge", "pdsh": "pdsh", "sshd": "openssh-server", "ip": "iproute2",
}  # fmt: skip
NAMESPACES = ("--mount", "--uts", "--net", "--pid")
SLURM_CONF = """
ClusterName=test
SlurmctldHost=head
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
JobAcctGatherType=jobacct_gather/none
JobRequeue=1
KillWait=30
SlurmdTimeout=10
InactiveLimit=0
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n1,n2 CPUs=64 RealMemory=4000 Gres=gpu:8
PartitionName=low Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=2
"""
GRES_CONF = "Name=gpu File={folder}/gpu[0-7]\n"  # empty files: Slurm counts them and gives their numbers to jobs
SSH_CONFIG = """
IdentityFile {folder}/user_key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""
SSHD_CONFIG = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
StrictModes no
PermitRootLogin yes
PidFile none
"""
# $1: host name; $2: folder. /run is the machine's own: sshd and munged keep things there
SET_UP = """
set -e
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/ssh_config" /etc/ssh/ssh_config
mount -t tmpfs none /run
mkdir /run/sshd
ip link set lo up
"""


def what_is_missing() -> str:
    """Why no cluster can be started here; empty if one can."""
    packages = [package for name, package in PROGRAMS.items() if not shutil.which(name, path=_path())]
    if packages:
        return f"not installed: {' '.join(packages)}"
    bridge = ["unshare", *NAMESPACES, "ip", "link", "add", "nodes", "type", "bridge"]  # it goes with its namespace
    if subprocess.run(bridge, capture_output=True, env=os.environ | {"PATH": _path()}).returncode:
        return "namespaces and network bridges need root, and a kernel that has them"
    return ""


class Cluster:
    """Context of a running cluster. folder: an empty one, for configuration, keys and logs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._machines: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "Cluster":
        try:
            self._write_files()
            self._boot("head", parent=None)
            self.run("ip link add nodes type bridge && ip link set nodes up")
            self.run(f"ip address add {NETWORK}254/24 dev nodes")
            self.run(f"munged --key-file={self.folder}/munge.key --socket={self.folder}/munge.socket --force "
                     f"--pid-file={self.folder}/munged.pid --seed-file={self.folder}/munged.seed "
                     f"--log-file={self.folder}/munged.log")  # fmt: skip
            self.run("slurmctld")
            for name in NODES:
                self.start_node(name)
            self.wait_for_nodes()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for name in sorted(self._machines, reverse=True):  # n2, n1, head
            self._end(name)

    def _write_files(self) -> None:
        hosts = [f"127.0.0.1 localhost\n{NETWORK}254 head"] + [f"{NETWORK}{i} {n}" for i, n in enumerate(NODES, 1)]
        files = {"hosts": "\n".join(hosts) + "\n", "slurm.conf": SLURM_CONF, "gres.conf": GRES_CONF}
        files |= {"ssh_config": SSH_CONFIG, "sshd_config": SSHD_CONFIG}
        for name, text in files.items():
            (self.folder / name).write_text(text.replace("{folder}", str(self.folder)))
        for name in NODES:
            (self.folder / f"spool.{name}").mkdir()
        for i in range(8):
            (self.folder / f"gpu{i}").touch()
        (self.folder / "state").mkdir()
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o600)
        for key in ("host_key", "user_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / key], check=True)

    def _boot(self, name: str, parent: str | None) -> None:
        """Starts a machine, whose first process is a shell that ends with this process and collects orphans."""
        command = [*(self.enter(parent) if parent else []), "unshare", *NAMESPACES, "--fork", "--kill-child"]
        with open(self.folder / f"{name}.log", "ab") as log:
            self._machines[name] = machine = subprocess.Popen(
                [*command, "--mount-proc", "bash"], env=self.environment(), text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
        machine.stdin.write(f"set -- {name} '{self.folder}'\n{SET_UP}\necho up\n")
        machine.stdin.flush()
        assert machine.stdout.readline() == "up\n", f"machine {name} did not start"

    def _first_process(self, name: str) -> int:
        """Returns the id, in this process's namespace, of the machine's first process: nsenter's or unshare's shell."""
        pid = self._machines[name].pid
        while Path(f"/proc/{pid}/comm").read_text() != "bash\n":
            pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
        return pid

    def enter(self, name: str) -> list[str]:
        """Returns what to put in front of a command, so that it runs on the machine."""
        return ["nsenter", "--target", str(self._first_process(name)), *NAMESPACES, "--wdns=" + os.getcwd()]

    def environment(self) -> dict[str, str]:
        """Returns this process's environment without a process group, with the configuration of this cluster."""
        return clean_environment() | {"SLURM_CONF": f"{self.folder}/slurm.conf", "PATH": _path()}

    def run(self, command: str, node: str = "head", check: bool = True, timeout: float = 240, **variables: str):
        """Runs a line of shell on a machine. Returns the CompletedProcess with its output."""
        result = subprocess.run(
            [*self.enter(node), "bash", "-c", command], env=self.environment() | variables,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
        assert not check or result.returncode == 0, f"{command}: {result.returncode}: {result.stdout}{result.stderr}"
        return result

    def start(self, command: str, log: Path, node: str = "head", **variables: str) -> subprocess.Popen:
        """Starts a line of shell on a machine. Its output goes to the file."""
        with open(log, "wb") as file:
            return subprocess.Popen(
                [*self.enter(node), "bash", "-c", command], env=self.environment() | variables,
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def start_node(self, name: str) -> None:
        """Starts a machine with sshd and slurmd, in the network of the head."""
        self._boot(name, parent="head")
        cable = ["nsenter", "--target", str(self._first_process("head")), "--net", "ip", "link"]
        peer = ["peer", "name", "eth0", "netns", str(self._first_process(name))]
        subprocess.run([*cable, "add", name, "type", "veth", *peer], check=True)
        self.run(f"ip link set {name} master nodes up")
        address = f"{NETWORK}{NODES.index(name) + 1}/24"
        self.run(f"ip address add {address} dev eth0 && ip link set eth0 up", name)
        self.run(f"{shutil.which('sshd', path=_path())} -f {self.folder}/sshd_config && slurmd", name)

    def kill_node(self, name: str) -> None:
        """Takes a node's power: the others get no word from it, and no process of it goes on."""
        self.run(f"ip link delete {name}")
        self._end(name)

    def _end(self, name: str) -> None:
        if self._machines[name].poll() is None:
            os.kill(self._first_process(name), signal.SIGKILL)
        self._machines.pop(name).communicate()

    def wait_for_nodes(self, seconds: float = 60) -> None:
        """Returns when both nodes are idle."""
        wait_until(lambda: self.run("sinfo -h -p low -t idle -o %D").stdout.strip() == "2", seconds, "idle nodes")


def wait_until(condition, seconds: float, what: str) -> None:
    """Returns when the condition is true. AssertionError after that many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.2)


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place, Cluster(Path(place)) as cluster:
        subprocess.run([*cluster.enter("head"), "bash", "-c", *sys.argv[1:]], env=cluster.environment())
