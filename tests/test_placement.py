"""What a measurement on another node raises, on a local Ray."""

from collections.abc import Iterator
from typing import Any

import pytest

from flyweight.search.local_ray import started
from flyweight.search.placement import _get
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


def test_an_actor_that_cannot_begin_says_why() -> None:
    import ray

    class Broken:
        def __init__(self) -> None:
            raise FlyweightError("nodes of two kinds")

        def time(self) -> None: ...

    actor: Any = ray.remote(Broken).remote()
    with pytest.raises(OSError, match="nodes of two kinds"):
        _get(actor.time.remote())
