"""Signals of a search, and a Ray that does not start."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flyweight.search.cache import cache_folder
from flyweight.search.driver import search
from flyweight.search.local_ray import connected, ctrl_c_given_back, started, terminable
from flyweight.search.spec import Objective, Spec
from flyweight.spaces import BadInput, FlyweightError


def test_ctrl_c_is_given_back_by_what_takes_it() -> None:
    mine = signal.getsignal(signal.SIGINT)
    with ctrl_c_given_back():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as Ray Tune does, with a handler of its own
    assert signal.getsignal(signal.SIGINT) is mine


def test_sigterm_ends_what_a_script_runs_in_the_background() -> None:
    def ended() -> None:
        with terminable():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell has it there
    try:
        with pytest.raises(KeyboardInterrupt):
            ended()
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    handlers = []

    def run() -> None:
        with terminable():
            handlers.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(run).result()  # raises what it raised
    assert handlers == [before]


def test_a_ray_of_the_process_is_not_ended_but_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.shutdown", lambda: pytest.fail("it is the user's"))
    refused = pytest.raises(BadInput, match=r"connected to a Ray.* call ray\.shutdown\(\) first")
    with refused, started(1, None):
        pass
    spec = Spec(task="nowhere.py:Net", objective=Objective(max_drop=1))
    with refused:
        search(spec, tmp_path / "run")
    assert not (tmp_path / "run").exists()  # before anything else is looked at


def test_a_local_search_does_not_go_where_jobs_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")  # which ray.init would take
    monkeypatch.setattr("ray.init", lambda **options: asked.append(options["address"]))
    with started(1, None):
        pass
    assert asked == ["local"]


def test_a_ray_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def times_out(**_: object) -> None:
        raise Exception("The current node timed out during startup.")  # its own words and type

    monkeypatch.setattr("ray.init", times_out)
    with (
        pytest.raises(FlyweightError, match="Ray does not start here: The current node timed out"),
        started(1, None),
    ):
        pass


def test_a_cache_that_is_named_by_a_relative_path_is_where_the_command_was_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The folder that the search runs in is removed at its end."""
    found = []
    spec = Spec(task="t.py:T", objective=Objective(max_drop=1))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLYWEIGHT_CACHE", "cache")
    monkeypatch.setattr("ray.init", lambda **_: found.append(cache_folder(spec).absolute()))
    with started(1, None):
        pass
    assert found == [tmp_path / "cache"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            RuntimeError(
                "Version mismatch: The cluster was started with:\n    Ray: 2.40.0\n"
                "    Python: 3.10.1\nThis process on node 1 was started with:\n"
                "    Ray: 2.60.0\n    Python: 3.11.7\n"
            ),
            r"of other versions than this process.* Ray: 2.40.0 Python: 3.10.1 .* Ray: 2.60.0",
        ),
        (ConnectionError("ray client connection timeout"), "that takes this token: ray client"),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_bad_input(
    monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def refuses(**_: object) -> None:
        raise error

    monkeypatch.setattr("ray.init", refuses)
    with pytest.raises(BadInput, match=words), started(1, "ray://head:10001"):
        pass


def test_rays_client_is_refused() -> None:
    spec = Spec(task="nowhere.py:Net", objective=Objective(max_drop=1))
    refused = pytest.raises(BadInput, match="send it with `flyweight submit`")
    with refused, connected(spec, "ray://head:10001"):
        pass


def test_other_errors_of_a_search_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.init", lambda **_: None)
    with pytest.raises(Exception, match=r"^a task raised it$") as caught, started(1, None):
        raise Exception("a task raised it")
    assert type(caught.value) is Exception
