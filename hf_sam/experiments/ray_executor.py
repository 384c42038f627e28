"""Runs on a Ray cluster, each in an actor that holds its CPUs and GPUs, outlives the driver and ends with the run."""

from __future__ import annotations

import os
import socket
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .execution import __name__ as RUN_MODULE
from .executors import Ending, Executor

NAMESPACE = "hf_sam"  # namespace of the actors, where a later driver finds them by name


class ClusterLostError(ValueError):
    """The Ray cluster to which the runs were submitted no longer exists."""


LOST = (
    "The Ray cluster at {head} has ended or was restarted. No finished run is lost. When the cluster is up again, repeat "
    "the same command: it runs only what is missing and resumes from the last checkpoints."
)


@dataclass
class RayExecutor(Executor):
    """
    Runs on a Ray cluster.

    Args:
        address (`str`, *optional*): Address of the cluster; by default the running one, or else a new local one.
        num_cpus (`float`, *optional*, defaults to 1): CPUs per run.
        num_gpus (`float`, *optional*): GPUs per run; by default 1 if the cluster has GPUs.
        resources (`dict`, *optional*): Custom resources per run.
        queue (`int`, *optional*, defaults to 64): Maximum number of runs submitted at a time, including waiting ones.
        environment (`dict[str, str]`, *optional*): Environment variables of each run.
        python (`str`, *optional*): Python interpreter on the nodes; by default this one.
        patience (`float`, *optional*, defaults to 5.0): Seconds until a record written on another node is visible here.
    """

    address: str | None = None
    num_cpus: float = 1
    num_gpus: float | None = None
    resources: dict[str, float] = field(default_factory=dict)
    queue: int = 64
    environment: dict[str, str] = field(default_factory=dict)
    python: str = sys.executable
    patience: float = 5.0

    kind = "ray"

    def __post_init__(self):
        try:
            import ray
        except ImportError:
            raise ValueError("executor=ray needs Ray: pip install 'hf-sam[ray]'") from None
        self._ray = ray
        self._ends: dict[str, Any] = {}  # job: reference to the reason of its end
        self._over: dict[str, Ending] = {}
        self._head: str | None = None  # address of the cluster's head node
        self._is_lost = False

    @property
    def room(self) -> int:
        return self.queue

    def _connect(self) -> None:
        if not self._ray.is_initialized():
            try:
                self._ray.init(self.address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
            except ConnectionError as error:
                where = self.address or "the default address"
                raise ValueError(
                    f"executor=ray: no cluster answers at {where} ({error}); start Ray there, or set executor.ray.address."
                ) from None
            self._head = self._ray.get_runtime_context().gcs_address
        if not answers(self._head):
            raise self._lost()

    def _lost(self) -> ClusterLostError:
        """Return the error for a lost head; without it, Ray would end this process after a minute and name no cause."""
        self._is_lost = True
        return ClusterLostError(LOST.format(head=self._head))

    def submit(self, folders: Sequence[Path]) -> list[str]:
        self._connect()
        gpus = self.num_gpus
        if gpus is None:
            gpus = 1 if self._ray.cluster_resources().get("GPU") else 0
        actor = self._ray.remote(_actor_class())
        options = {
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "num_cpus": self.num_cpus,
            "num_gpus": gpus,
            "resources": self.resources or None,
            "max_restarts": 0,  # the driver submits the run again if there is no record
            "max_concurrency": 8,  # successive drivers may wait for its end
        }
        environment = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ} | self.environment
        names = []
        for folder in folders:
            name = f"ray {uuid.uuid4().hex}"
            launcher = list(self.launcher) or [self.python]
            words = [*launcher, "-m", RUN_MODULE, str(folder), "--submission", name]
            handle = actor.options(name=name, **options).remote(words, str(folder), os.getcwd(), environment)
            self._ends[name] = handle.end.remote()
            names.append(name)
        return names

    def ended(self, jobs: Sequence[str]) -> dict[str, Ending]:
        if not jobs:
            return {}
        self._connect()
        for name in set(jobs) - self._ends.keys() - self._over.keys():  # submitted by an earlier driver
            try:
                self._ends[name] = self._ray.get_actor(name, namespace=NAMESPACE).end.remote()
            except ValueError:  # no such actor exists any more
                self._over[name] = Ending("it ended while no driver was running", is_own_fault=False)
        names = {reference: name for name, reference in self._ends.items()}
        done = self._ray.wait(list(names), num_returns=len(names), timeout=0)[0] if names else []
        for reference in done:
            self._over[names[reference]] = self._why(self._ends.pop(names[reference]))
        if done and not answers(self._head):  # the jobs were lost with the head, not through their own fault
            raise self._lost()
        return {name: self._over[name] for name in jobs if name in self._over}

    def _why(self, reference: Any) -> Ending:
        try:
            return Ending(self._ray.get(reference))
        except self._ray.exceptions.ActorDiedError as error:
            if "creation task" in str(error):  # the command could not be started
                return Ending(" ".join(str(error).split())[-200:])
            is_taken_away = getattr(error, "preempted", False)
            return Ending("the worker was killed or its node was lost", is_own_fault=False if is_taken_away else None)
        except self._ray.exceptions.RayError as error:
            return Ending(" ".join(str(error).split())[:200])

    def wait(self) -> None:
        time.sleep(0.2)

    def cancel(self, jobs: Sequence[str]) -> None:
        self._connect()
        for name in jobs:
            try:
                self._ray.kill(self._ray.get_actor(name, namespace=NAMESPACE))
            except ValueError:  # it has ended
                continue

    def close(self) -> None:
        if not self._is_lost:  # shutdown would wait for an answer
            self._ray.shutdown()


def answers(head: str, tries: int = 5) -> bool:
    """Whether the head of a cluster, `host:port`, accepts connections; retries for some seconds before giving up."""
    host, port = head.rsplit(":", 1)
    for _ in range(tries):
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError:
            time.sleep(0.5)
        else:
            return True
    return False


def _actor_class() -> type:
    """Define the actor's class in a function, so that it is pickled by value: the actor does not need hf_sam."""

    class Run:
        """A run in its own process."""

        def __init__(self, words: list[str], folder: str, cwd: str, environment: dict[str, str]):
            import os
            import subprocess
            import threading

            import ray

            self.over = threading.Event()
            self.cause = ""
            variables = {**os.environ, **environment}
            with open(os.path.join(folder, "log.txt"), "ab") as log:
                self.process = subprocess.Popen(
                    [*words, "--parent", str(os.getpid())],
                    cwd=cwd if os.path.isdir(cwd) else folder,
                    env=variables,
                    stdout=log,
                    stderr=log,
                    stdin=subprocess.DEVNULL,
                )
            me = ray.get_runtime_context().current_actor

            def watch() -> None:
                code = self.process.wait()
                self.cause = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
                self.over.set()
                threading.Event().wait(1.0)  # until callers of `end` have received their answer
                ray.kill(me)

            threading.Thread(target=watch, daemon=True).start()

        def end(self) -> str:
            """Wait for the end of the process, and return its reason."""
            self.over.wait()
            return self.cause

    return Run
