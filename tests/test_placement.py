"""What a measurement on another node raises, on a local Ray."""

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from flyweight.search import placement
from flyweight.search.local_ray import started
from flyweight.search.placement import Died, Here, _get
from flyweight.spaces import FlyweightError, Impossible

pytestmark = pytest.mark.slow  # starts a local Ray


@pytest.fixture(scope="module", autouse=True)
def local_ray(request: pytest.FixtureRequest) -> Iterator[None]:
    request.getfixturevalue("ray_token")
    with started(1, None):
        yield


def raises(error: Exception) -> Any:
    """The answer of a task that raises ``error``."""

    def task() -> None:
        raise error

    import ray

    return ray.remote(task).options(max_retries=0).remote()


def test_what_a_measurement_raises_ends_a_search_in_order_or_rejects_a_policy() -> None:
    with pytest.raises(OSError, match="nodes of two kinds"):  # which a search survives
        _get(raises(FlyweightError("nodes of two kinds")))
    with pytest.raises(Impossible, match="not taken"):
        _get(raises(Impossible("not taken")))


def test_a_policy_that_kills_the_runtime_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fragile:
        """A meter that dies of one model, and of its teacher too if that is such a one."""

        def __init__(self, _: str, __: int, teacher: bytes, ___: Any, teacher_ms: float) -> None:
            self.teacher, self.teacher_ms = teacher, teacher_ms

        def alone(self) -> float:
            return 2.0

        def provisional(self, model: bytes) -> tuple[float, float, float]:
            if model == b"deadly":
                os._exit(1)
            return (self.teacher_ms,) * 3

    monkeypatch.setattr(placement, "Meter", Fragile)
    target = SimpleNamespace(runtime="onnxruntime", threads=1)
    ready: Any = SimpleNamespace(
        spec=SimpleNamespace(target=target), teacher=b"teacher", request=dict
    )
    here = Here(ready)
    assert here.alone() == 2.0
    with pytest.raises(Impossible, match="the runtime dies of it"):
        here.provisional(b"deadly")
    assert here.provisional(b"good") == (2.0, 2.0, 2.0)  # what the teacher took is known on
    here.close()
    ready.teacher = b"deadly"
    with pytest.raises(Died):  # it is not the model that it dies of
        Here(ready).provisional(b"deadly")


def test_an_actor_that_cannot_begin_says_why() -> None:
    import ray

    class Broken:
        def __init__(self) -> None:
            raise FlyweightError("nodes of two kinds")

        def time(self) -> None: ...

    actor: Any = ray.remote(Broken).remote()
    with pytest.raises(OSError, match="nodes of two kinds"):
        _get(actor.time.remote())
