"""Several workers on one folder: each run is claimed by one of them, and taken over when its worker is gone.

A claim is a file whose age says when its worker was last alive. Claims are made and broken under one lock, so that two
workers never decide at the same time. A shared folder is all that workers on different machines need.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

CLAIM_NAME = "claim.json"


class Claims:
    """
    The claims of one worker in a study's folder.

    Args:
        folder (`Path`): The study's `output_dir`.
        stale_after (`float`, *optional*, defaults to 60.0):
            Seconds without a sign of life after which a claim may be taken over.
    """

    def __init__(self, folder: Path, stale_after: float = 60.0):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.stale_after = folder, stale_after
        self.owner = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self.lock = FileLock(folder / ".lock")

    def is_taken(self, run: Path) -> bool:
        """Whether a worker that is alive has claimed the run in folder `run`."""
        try:
            age = self._now() - (run / CLAIM_NAME).stat().st_mtime
        except FileNotFoundError:
            return False
        return age < self.stale_after

    def take(self, run: Path) -> None:
        """Claims a run; the caller holds `lock` and has seen that it is free."""
        run.mkdir(parents=True, exist_ok=True)
        (run / CLAIM_NAME).write_text(json.dumps({"owner": self.owner}))

    def owns(self, run: Path) -> bool:
        """Whether the claim is still this worker's: one that was suspended for long may have lost it."""
        try:
            return json.loads((run / CLAIM_NAME).read_text()).get("owner") == self.owner
        except (OSError, json.JSONDecodeError):
            return False

    def release(self, run: Path) -> None:
        """Gives up a claim of this worker."""
        with self.lock:
            if self.owns(run):
                (run / CLAIM_NAME).unlink()

    @contextmanager
    def kept_alive(self, run: Path) -> Iterator[threading.Event]:
        """Renews a claim while the block runs; the event that it yields is set when the claim was lost."""
        done, lost = threading.Event(), threading.Event()

        def renew() -> None:
            while not done.wait(self.stale_after / 6):
                with self.lock:
                    if not self.owns(run):
                        lost.set()
                        return
                    os.utime(run / CLAIM_NAME)

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield lost
        finally:
            done.set()
            thread.join()

    def _now(self) -> float:
        """The time by the folder's own clock: machines that share it need not agree on theirs."""
        probe = self.folder / f".clock-{self.owner}"
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now
