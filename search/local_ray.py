"""Ray for a search: a local one, unless an address is given."""

import contextlib
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray._private import services
from ray._private.utils import detect_fate_sharing_support

from ..kernels.cores import cores
from ..spaces import BadInput, FlyweightError
from .spec import Spec


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM (a job that is stopped, `timeout`, a shutdown) ends a search as Ctrl-C does: with the
    best so far. Once: `timeout` sends it to a process and again to the group of that.

    Signals are the main thread's: a search in another one leaves them alone, as Tune does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, lambda *_: None)
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of what a script runs with `&`
            signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def ctrl_c_given_back() -> contextlib.AbstractContextManager[None]:
    """Tune (2.60) takes Ctrl-C for itself and keeps it unless it came: it is given back here, so
    that one that comes later, while finalists are measured, is an interruption."""
    return _given_back(signal.SIGINT)


@contextlib.contextmanager
def _given_back(number: signal.Signals) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(number)
    try:
        yield
    finally:
        signal.signal(number, before)


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """What is begun here of Ray gets a process group of its own: what is sent to the whole group of
    a search (Ctrl-C in a terminal, SIGTERM of `timeout` or of a CI) is the search's to handle, and
    without Ray's processes it could end nothing well. Ray (2.60) has no setting for it; where the
    kernel does not end them with this process, Ray itself does by the group, and so it stays."""
    shared: bool = detect_fate_sharing_support()  # type: ignore[no-untyped-call]
    if not (shared and sys.platform == "linux"):
        yield
        return
    inside: Any = services
    popen = inside.ConsolePopen
    inside.ConsolePopen = partial(popen, process_group=0)
    try:
        yield
    finally:
        inside.ConsolePopen = popen


def check_no_ray() -> None:
    """Raises BadInput where this process has a Ray already. It would end with the search, and may
    be of other settings: its workers ask for no token, say."""
    if ray.is_initialized():
        raise BadInput(
            "this process is connected to a Ray, but a search needs one of its own, which ends "
            "with it; call ray.shutdown() first, or run the search in another process (`flyweight "
            "search`, with --address for a cluster)"
        )


@contextlib.contextmanager
def connected(spec: Spec, address: str | None) -> Iterator[None]:
    """Ray for a search, with the CPUs that it asks for. Raises BadInput."""
    if address and address.startswith("ray://"):
        raise BadInput(
            f"--address {address}: Ray's client cannot run a search; send it with `flyweight "
            "submit` to the dashboard, or give --address auto on a node of the cluster"
        )
    with started(int(spec.search.concurrency * spec.resources.cpus + 0.999), address):
        yield


@contextlib.contextmanager
def started(cpus: int, address: str | None) -> Iterator[None]:
    """Ray, local with at least ``cpus`` CPUs unless an address is given, protected by a token in
    either case. Raises BadInput, also where there is a Ray already."""
    check_no_ray()
    if address is None:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    local: dict[str, Any] = {
        "num_cpus": max(cores(), cpus),
        "include_dashboard": False,
    }
    if cache := os.environ.get("FLYWEIGHT_CACHE"):  # from here, whoever named it means
        os.environ["FLYWEIGHT_CACHE"] = str(Path(cache).absolute())
    here, scratch = Path.cwd(), tempfile.mkdtemp(prefix="flyweight-")
    # Ray puts the driver's folder on every worker's path: one that nobody else can write to.
    os.chdir(scratch)
    try:
        try:
            with _apart(), _given_back(signal.SIGTERM):  # Ray sets a handler of its own
                ray.init(
                    address=address or "local",  # else RAY_ADDRESS, if that is set
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    **({} if address else local),
                )
        except Exception as error:
            if type(error) is not Exception:  # as Ray (2.60) raises of a node that does not come up
                raise
            raise FlyweightError(
                f"Ray does not start here: {error} Is the machine short of memory or very busy? "
                "Try again; its logs are in /tmp/ray/session_latest/logs"
            ) from error
        yield
    except ConnectionError as error:
        # Ray says no more of a token that is not the cluster's.
        raise BadInput(
            f"no Ray cluster at {address} that takes this token: {error}; set RAY_AUTH_TOKEN, or "
            "RAY_AUTH_TOKEN_PATH to a file that holds the cluster's"
        ) from error
    except ray.exceptions.AuthenticationError as error:
        raise BadInput(
            f"the cluster at {address} asks for a token; set RAY_AUTH_TOKEN, or "
            "RAY_AUTH_TOKEN_PATH to a file that holds it"
        ) from error
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise
        raise BadInput(  # Ray's text says both versions, of itself and of Python
            f"the cluster at {address} is of other versions than this process; flyweight needs the "
            f"same on both. {' '.join(str(error).split())}"
        ) from error
    finally:
        ray.shutdown()
        os.chdir(here)
        shutil.rmtree(scratch, ignore_errors=True)
