"""
A real Slurm on this machine, without systemd and beside whatever else runs: munged, slurmctld and slurmd in one folder.

    python tests/clusters/slurm_here.py /tmp/slurm      # until Ctrl-C; prints the variable that finds it

Two partitions share one node of so many CPUs: `main`, and `urgent`, whose jobs have those of `main` requeued.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "srun")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])

CONFIGURATION = """
ClusterName=here
SlurmctldHost={host}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2,defer_batch
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=3
MaxArraySize=20001
NodeName={node} NodeAddr=127.0.0.1 NodeHostname={host} CPUs={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes={node} Default=YES MaxTime=INFINITE PriorityTier=1 State=UP
PartitionName=urgent Nodes={node} MaxTime=INFINITE PriorityTier=10 State=UP
"""


def missing_programs() -> list[str]:
    """Those of Slurm and munge that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


@contextmanager
def slurm(folder: Path, cpus: int = 2) -> Iterator[dict[str, str]]:
    """
    Start a cluster of this one machine, and end it with the block.

    Args:
        folder (`Path`): For keys, sockets, state and logs; with a short path, since sockets are in it.
        cpus (`int`, *optional*, defaults to 2): Of the node; not more than the machine has.

    Yields:
        `dict[str, str]`: Environment variables under which `sbatch` and the others find it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("state", "spool"):
        (folder / name).mkdir(exist_ok=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    host = socket.gethostname()
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    values = {"host": host, "folder": folder, "user": user, "node": "here", "cpus": cpus, "ports": free_ports(2)}
    configuration = folder / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(**values))
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    variables = {"SLURM_CONF": str(configuration), "PATH": PATH}
    files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid"}
    files |= {"log-file": "munged.log", "seed-file": "munged.seed"}
    commands = [
        ["munged", "--foreground", "--force", *(f"--{name}={folder / file}" for name, file in files.items())],
        ["slurmctld", "-D", "-i"],
        ["slurmd", "-D", "-N", "here"],
    ]
    daemons = []
    try:
        for words in commands:
            with open(folder / f"{words[0]}.out", "ab") as out:
                environment = {**os.environ, **variables}
                daemons.append(subprocess.Popen(words, env=environment, stdout=out, stderr=out, start_new_session=True))
            if words[0] == "munged":
                wait_for((folder / "munge.socket").exists, daemons, folder)
        wait_for(lambda: node_state(variables) in ("idle", "mixed", "allocated"), daemons, folder)
        yield variables
    finally:
        subprocess.run(
            ["scancel", f"--user={user}"], env={**os.environ, **variables}, check=False, timeout=60, capture_output=True
        )
        time.sleep(1.0)
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(daemons):
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def node_state(variables: dict[str, str]) -> str:
    """What `sinfo` says of the node; empty while the controller does not answer."""
    words = ["sinfo", "--noheader", "--partition=main", "--format=%T"]
    found = subprocess.run(words, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
    return found.stdout.strip().rstrip("*~#")


def wait_for(condition, daemons: list[subprocess.Popen], folder: Path, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        dead = [daemon.args[0] for daemon in daemons if daemon.poll() is not None]
        if dead or time.monotonic() > deadline:
            logs = "\n".join(
                f"{path.name}: " + "\n".join(path.read_text(errors="replace").splitlines()[-5:])
                for path in [*folder.glob("*.out"), *folder.glob("*.log")]
            )
            raise RuntimeError(f"Slurm did not start; ended: {dead or 'nothing'}.\n{logs}")
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for entry in sockets:
            entry.bind(("127.0.0.1", 0))
        return [entry.getsockname()[1] for entry in sockets]
    finally:
        for entry in sockets:
            entry.close()


if __name__ == "__main__":
    if missing := missing_programs():
        sys.exit(f"Not installed: {', '.join(missing)}. On Debian: apt-get install slurm-wlm munge")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with slurm(Path(sys.argv[1]).resolve()) as found:
        print(f"export SLURM_CONF={found['SLURM_CONF']}", flush=True)
        signal.pause()
