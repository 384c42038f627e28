"""Runs as Slurm jobs, submitted in arrays by submitit and monitored by `squeue`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .execution import __name__ as RUN_MODULE
from .executors import Ending, Executor

logger = logging.get_logger(__name__)

# States of jobs that will not run again by themselves, and those among them that are not the run's fault.
OVER = frozenset(
    ["BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"]
)
TAKEN_AWAY = frozenset(["BOOT_FAIL", "NODE_FAIL", "PREEMPTED"])
TO_BE_REPEATED = ("limit", "timed out", "unable to contact", "temporarily")  # in sbatch errors worth a retry


@dataclass
class SlurmExecutor(Executor):
    """
    Runs as Slurm jobs.

    Args:
        partition, qos, account, memory (`str`, *optional*): Options of `sbatch`; by default Slurm's own defaults.
        minutes (`int`, *optional*, defaults to 240):
            Time limit of a job. Jobs that approach it, or are preempted, are requeued and resume from their checkpoint.
        gpus (`int`, *optional*, defaults to 0): GPUs per run.
        cpus (`int`, *optional*, defaults to 1): CPUs per run.
        queue (`int`, *optional*, defaults to 200): Maximum number of jobs submitted at a time, including pending ones.
        timeouts (`int`, *optional*, defaults to 10): Number of times that a run may reach its time limit.
        setup (`list[str]`, *optional*): Lines in the job's script before the run, such as `module load cuda`.
        sbatch (`dict`, *optional*): Any other options of `sbatch`, such as `{constraint: a100}`.
        environment (`dict[str, str]`, *optional*): Environment variables of each run.
        poll (`float`, *optional*, defaults to 10.0): Seconds between queries of the queue.
        patience (`float`, *optional*, defaults to 10.0): Seconds until a record written on another node is visible
            here.
    """

    partition: str | None = None
    qos: str | None = None
    account: str | None = None
    memory: str | None = None
    minutes: int = 240
    gpus: int = 0
    cpus: int = 1
    queue: int = 200
    timeouts: int = 10
    setup: list[str] = field(default_factory=list)
    sbatch: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    poll: float = 10.0
    patience: float = 10.0

    kind = "slurm"

    def __post_init__(self):
        try:
            import submitit
        except ImportError:
            raise ValueError("executor=slurm needs submitit: pip install 'hf-sam[slurm]'") from None
        self._submitit = submitit

    @property
    def room(self) -> int:
        return self.queue

    def submit(self, folders: Sequence[Path]) -> list[str]:
        try:
            executor = self._submitit.SlurmExecutor(_scripts(folders[0]), max_num_timeout=self.timeouts)
            executor.update_parameters(**self._parameters())
            with executor.batch():
                jobs = [
                    executor.submit(_job_class()(self._words(folder), folder, self.environment)) for folder in folders
                ]
        except (self._submitit.core.utils.FailedJobError, RuntimeError) as error:
            message = " ".join(str(error).split())
            if any(word in message.lower() for word in TO_BE_REPEATED):
                logger.warning("Slurm accepts no more jobs now (%s); retrying later.", message)
                return []
            raise ValueError(f"Slurm rejected the jobs: {message}") from error
        return [f"slurm {job.job_id}" for job in jobs]

    def _words(self, folder: Path) -> list[str]:
        return [*(self.launcher or [sys.executable]), "-m", RUN_MODULE, str(folder)]

    def _parameters(self) -> dict[str, Any]:
        stated = {"partition": self.partition, "qos": self.qos, "account": self.account, "mem": self.memory}
        if self.gpus:
            stated["gpus_per_node"] = self.gpus
        return {
            **{key: value for key, value in stated.items() if value is not None},
            "job_name": "hf_sam",
            "time": self.minutes,
            "cpus_per_task": self.cpus,
            "ntasks_per_node": 1,
            "array_parallelism": self.queue,
            "setup": self.setup,
            "additional_parameters": {"requeue": True, **self.sbatch},
        }

    def ended(self, jobs: Sequence[str]) -> dict[str, Ending]:
        if not jobs:
            return {}
        states = self._states()
        if states is None:
            return {}
        found = {}
        for name in jobs:
            state, reason = states.get(name, ("gone", ""))
            if state in OVER or state == "gone":
                cause = f"Slurm: {state.lower()}" + (f" ({reason})" if reason not in ("", "None") else "")
                found[name] = Ending(cause, is_own_fault=state not in TAKEN_AWAY)
        return found

    def _states(self) -> dict[str, tuple[str, str]] | None:
        """Return state and reason of this user's jobs known to the controller; `None` if it does not answer."""
        command = ["squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}", "--format=%i|%T|%r"]
        try:
            lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
        except FileNotFoundError:
            raise ValueError(
                "executor=slurm needs sbatch, squeue and scancel on this machine; run the command on a login node."
            ) from None
        except subprocess.SubprocessError as error:
            logger.warning("squeue does not answer (%s); retrying later.", getattr(error, "stderr", "") or error)
            return None
        return {f"slurm {job}": (state, reason) for job, state, reason in (line.split("|", 2) for line in lines)}

    def wait(self) -> None:
        time.sleep(self.poll)

    def cancel(self, jobs: Sequence[str]) -> None:
        numbers = [name.split(" ", 1)[1] for name in jobs]
        for begin in range(0, len(numbers), 500):
            subprocess.run(["scancel", *numbers[begin : begin + 500]], check=True)

    def close(self) -> None:
        """Do nothing: jobs continue without a driver."""


def _scripts(run: Path) -> Path:
    """Return the folder for submitit's scripts and logs, next to the folders of the study's runs."""
    kinds = [parent for parent in run.parents if parent.name in ("runs", "trials")]
    return (kinds[0] if kinds else run).parent / "slurm"


def _job_class() -> type:
    """Define the job's class in a function, so that it is pickled by value: unpickling it does not import hf_sam."""

    class Job:
        """A run in its own process. `checkpoint` requeues the same job, which resumes by itself."""

        def __init__(self, words: list[str], folder: Path, environment: dict[str, str]):
            self.words, self.folder, self.environment = words, str(folder), environment

        def __call__(self) -> None:
            import os
            import subprocess

            task = os.environ.get("SLURM_ARRAY_TASK_ID")
            name = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}" if task else os.environ["SLURM_JOB_ID"]
            with open(os.path.join(self.folder, "log.txt"), "ab") as log:
                words = [*self.words, "--submission", f"slurm {name}", "--parent", str(os.getpid())]
                variables = {**os.environ, **self.environment}
                process = subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=variables)
                code = process.wait()
            if code:
                raise RuntimeError(f"The run ended with exit code {code}; see log.txt in {self.folder}.")

        def checkpoint(self):
            import submitit

            return submitit.helpers.DelayedSubmission(self)

    return Job
