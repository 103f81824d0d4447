"""Who holds a run directory: one process at a time, on whatever machine.

On one machine the system's file lock says it, and goes with its process. On a file system that
machines share it may reach no further than one of them: there a file says who holds the run, and is
touched as a sign of life. One that was not touched for long is of a process that is gone.
"""

import json
import os
import socket
import threading
import time
from pathlib import Path

from ..spaces import BadInput

NAME = "held.json"
TOUCH_S = 20.0
STALE_S = 120.0  # clocks of machines differ, and network file systems keep times for a while


class Hold:
    """Held from now on until ``close``. Raises BadInput if another machine's process holds it."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / NAME
        here = socket.gethostname()
        holder = read(run_dir)
        if holder and holder["host"] != here and (age := self._age()) < STALE_S:
            raise BadInput(
                f"{run_dir} is held by {told(holder)}, which gave a sign of life {age:.0f} s ago; "
                f"wait for it or use --out; if it is gone, try again {STALE_S:.0f} s after its last"
            )
        self._stop = threading.Event()
        self._path.write_text(json.dumps({"host": here, "pid": os.getpid()}))
        self._thread = threading.Thread(target=self._live, name="flyweight-hold", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._path.unlink(missing_ok=True)

    def _live(self) -> None:
        while not self._stop.wait(TOUCH_S):
            try:
                os.utime(self._path)
            except OSError:  # the run directory is away, or was removed: nobody can hold it
                continue

    def _age(self) -> float:
        try:
            return time.time() - self._path.stat().st_mtime
        except OSError:
            return STALE_S


def read(run_dir: Path) -> dict[str, str] | None:
    """Who says that they hold ``run_dir``: host and pid; None if nobody does."""
    try:
        found = json.loads((run_dir / NAME).read_text())
        return {"host": str(found["host"]), "pid": str(found["pid"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def told(holder: dict[str, str] | None) -> str:
    """``holder`` in words."""
    return f"process {holder['pid']} on {holder['host']}" if holder else "another process"
