"""Timing in a process of its own, which a model may kill without harm."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self

from ..spaces.errors import FlyweightError, Impossible
from .runtime import Inputs, Session, make_runtime
from .timing import LEAST_CALLS, TEACHER, Timing, time_sessions

ROUNDS, REPEATS, VISIT_MS = 11, 20, 20.0
CALLS_EACH = (ROUNDS + 1) * (1 + LEAST_CALLS)  # of a model in a group, however slow it is
PATIENCE_S = 900.0  # for one group; a kernel that takes longer hangs


class MeasuringProcess:
    """Times models beside a sentinel on one target. A context manager; each is a new session of
    the runtime, with memory of its own."""

    def __init__(self, runtime: str, threads: int, sentinel: bytes, inputs: Inputs) -> None:
        self._start = runtime, threads, sentinel, dict(inputs)

    def __enter__(self) -> Self:
        # Not multiprocessing: what it spawns runs the script anew that the user began (a search
        # without `if __name__ == "__main__"`), and what it forks has this process's threads.
        ours, theirs = socket.socketpair()
        with ours, theirs:
            code = f"from {__name__} import serve; serve({theirs.fileno()}, {os.getpid()})"
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", code],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is this process's, which closes the pipe
            )
            self._pipe = Connection(ours.detach())
        # Not as arguments: it may have died before it reads them.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._pipe.send(self._start)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._process.kill()
        self._process.wait()

    @property
    def pid(self) -> int:
        """Of the process that measures now."""
        return self._process.pid

    def time(self, models: Mapping[str, bytes]) -> dict[str, Timing | None]:
        """Timings of ``models`` and of the sentinel (``TEACHER``), interleaved; None for a model
        that the runtime cannot run, dies of or hangs in. Raises FlyweightError if that is the
        sentinel."""
        return self._time(models, ROUNDS, REPEATS)

    def bears(self, models: Mapping[str, bytes]) -> dict[str, bytes]:
        """Those of ``models`` that the runtime runs, and does not die of. Raises FlyweightError."""
        found = self._time(models, 1, 1)
        return {name: model for name, model in models.items() if found[name]}

    def _time(
        self, models: Mapping[str, bytes], rounds: int, repeats: int
    ) -> dict[str, Timing | None]:
        found = self._ask(models, rounds, repeats)
        if found is not None:
            return found
        alone = self._ask({}, rounds, repeats)
        if alone is None:
            raise FlyweightError("the runtime dies of the teacher's model on this device")
        alive = {n: model for n, model in models.items() if self._ask({n: model}, rounds, repeats)}
        # Once more beside one another: they are judged by the teacher in the same rounds.
        found = self._ask(alive, rounds, repeats) or alone
        return {**dict.fromkeys(models), **found}

    def _ask(
        self, models: Mapping[str, bytes], rounds: int, repeats: int
    ) -> dict[str, Timing | None] | None:
        """None if the process died of it; a new one is there then."""
        try:
            self._pipe.send((dict(models), rounds, repeats))
            if not self._pipe.poll(PATIENCE_S):
                raise EOFError
            answer: dict[str, Timing | None] = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.kill()
            self.__exit__(None)
            self.__enter__()
            return None
        return answer


def serve(pipe_fd: int, parent: int) -> None:
    """What the process does: it times what comes through the pipe until that is closed."""
    if sys.platform == "linux":  # else what hangs in a kernel would outlive who asked
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        return
    pipe = Connection(pipe_fd)
    try:
        runtime, threads, sentinel, inputs = pipe.recv()
        target = make_runtime(runtime, threads)
        teacher = target.load(sentinel)
    except (EOFError, Impossible):
        return  # who asks finds nobody, and says so
    while True:
        try:
            models, rounds, repeats = pipe.recv()
        except EOFError:
            return
        sessions: dict[str, Session] = {TEACHER: teacher}
        failed: dict[str, None] = {}
        for name, model in models.items():
            try:
                session = target.load(model)
                session.run(inputs)
                sessions[name] = session
            except Impossible:
                failed[name] = None
        timings = time_sessions(sessions, inputs, rounds, repeats, visit_ms=VISIT_MS)
        pipe.send({**timings, **failed})
