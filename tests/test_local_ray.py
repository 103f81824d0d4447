"""Signals of a search, and a Ray that does not start."""

import signal

import pytest

from flyweight.search.local_ray import started, terminable
from flyweight.spaces import BadInput, FlyweightError


def test_ctrl_c_is_given_back_by_what_takes_it() -> None:
    mine = signal.getsignal(signal.SIGINT)
    with terminable():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as Ray Tune does, with a handler of its own
    assert signal.getsignal(signal.SIGINT) is mine


def test_a_ray_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def times_out(**_: object) -> None:
        raise Exception("The current node timed out during startup.")  # its own words and type

    monkeypatch.setattr("ray.init", times_out)
    with (
        pytest.raises(FlyweightError, match="Ray does not start here: The current node timed out"),
        started(1, None),
    ):
        pass


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


def test_other_errors_of_a_search_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.init", lambda **_: None)
    with pytest.raises(Exception, match=r"^a task raised it$") as caught, started(1, None):
        raise Exception("a task raised it")
    assert type(caught.value) is Exception
