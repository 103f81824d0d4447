"""Who holds a run: one process at a time, on whatever machine.

On one machine the system's file lock says it, and goes with its process (``record.py``). Beyond it
a file in the run directory, and one in the storage, says who holds the run, and is written again
and again as a sign of life. One that was not for long is of a process that is gone.
"""

import json
import os
import socket
import threading
import time
from typing import Any

from pyarrow import ArrowException

from ..spaces import BadInput
from .storage import Storage

FOLDER = "held"
NAME = f"{FOLDER}/by.json"
SIGN_S = 20.0  # between two signs of life
STALE_S = 120.0  # the clocks of machines differ


class Hold:
    """Held from now on until ``close``. Raises BadInput if another process holds it, OSError if the
    storage is away. locked: no other process of this machine can hold it."""

    def __init__(self, storage: Storage, name: str, *, locked: bool = False) -> None:
        self._storage = storage
        try:
            holder = read(storage)
        except ArrowException as error:
            raise OSError(f"{name} cannot be read: {error}") from error
        if holder and not (locked and holder["host"] == socket.gethostname()) and _lives(holder):
            age = time.time() - holder["time"]
            raise BadInput(
                f"{name} is held by {told(holder)}, which gave a sign of life {age:.0f} s ago; "
                "wait for it or use another --out; if it is gone, try again "
                f"{STALE_S:.0f} s after its last"
            )
        self._sign()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._live, name="flyweight-hold", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Gives it back."""
        self._stop.set()
        self._thread.join()
        self._storage.remove(FOLDER)  # where it cannot be removed it grows stale

    def _live(self) -> None:
        while not self._stop.wait(SIGN_S):
            try:
                self._sign()
            except (OSError, ArrowException):  # away for a while
                continue

    def _sign(self) -> None:
        who = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
        self._storage.write(NAME, json.dumps(who).encode())


def read(storage: Storage) -> dict[str, Any] | None:
    """Who says that they hold the run: host, pid and the time of their last sign; None if nobody
    does. Raises OSError if the storage is away."""
    try:
        found = json.loads(storage.read(NAME))
        return {"host": str(found["host"]), "pid": int(found["pid"]), "time": float(found["time"])}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def told(holder: dict[str, Any] | None) -> str:
    """``holder`` in words."""
    return f"process {holder['pid']} on {holder['host']}" if holder else "another process"


def _lives(holder: dict[str, Any]) -> bool:
    if time.time() - holder["time"] > STALE_S:
        return False
    if holder["host"] != socket.gethostname():
        return True
    if holder["pid"] == os.getpid():  # the run directory may lie in the storage
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        return True
    return True
