"""Where latency is measured: the one seam, a ``Place``, which all ask who measure in a search.

                   trials run     profile, prices, teacher         finalists
one machine        there          there                            there
a cluster with     on the others  on the nodes that carry the      there
``target`` nodes                  resource ``target``, by turns
a cluster without  anywhere       the given device profile says;   nowhere: what is predicted stands
                                  without one, the driver's        until `flyweight measure RUN_DIR`
                                  machine stands in                on the device
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Protocol, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..kernels import DeviceProfile, MeasuringProcess, Timing
from ..spaces import BadInput, FlyweightError, Impossible
from .meter import Device, Feed, Meter, ThisMachine
from .ready import Ready
from .spec import Resources

TARGET = "target"  # the resource that a node carries whose latency counts
PATIENCE_S = 600.0  # for a node with it to come back, once there is none
COMES_S = 300.0  # for the first one, where nobody says that there is to be one
COMING_S = 5.0  # between two looks for a node that is waited for
LOOK_S = 10.0  # between two looks whether there is one

Say = Callable[[str], None]
T = TypeVar("T")


class Died(OSError):
    """The process that measured has died, perhaps of what it ran."""


class Place(Protocol):
    """Where to measure. Methods raise OSError where what measures is lost (``Died`` if its process
    died), Impossible for a model that the runtime does not take."""

    device: Device
    there: bool  # whether models can be timed at all

    def alone(self) -> float:
        """The teacher's latency in ms, while nothing else runs."""

    def provisional(self, model: bytes, /) -> tuple[float, float, float]:
        """See ``Meter.provisional``."""

    def finalists(
        self, models: Mapping[str, bytes], alone_ms: float, /
    ) -> dict[str, Timing] | None:
        """See ``Meter.finalists`` and ``of_finalists``; None where they cannot be measured."""

    def process(self) -> AbstractContextManager[Any]:
        """Something with the ``time`` and ``bears`` of a ``MeasuringProcess``."""

    def close(self) -> None:
        """Ends what measures."""


def of_finalists(
    place: Place, models: Mapping[str, bytes], alone_ms: float
) -> dict[str, Timing] | None:
    """What ``Place.finalists`` says, also where its process dies of some of them: those are left
    out as if the runtime had refused them. Raises OSError, FlyweightError."""
    try:
        return place.finalists(models, alone_ms)
    except Died:
        with place.process() as process:  # which outlives what it dies of, and says which
            return place.finalists(process.bears(models), alone_ms)


def place_of(
    ready: Ready,
    profile: DeviceProfile | None,
    local: bool,
    say: Say,
    wait_s: float = 0.0,
    before: str | None = None,
) -> Place:
    """Where a search measures. profile: the one that its spec names. local: Ray is of this machine
    alone. wait_s: for a target node to come, where neither one nor a profile is there. before: the
    target node of the session before, if it had one. Raises BadInput where that is another kind of
    device than artifacts are made for, or has gone."""
    here = Here(ready)
    if local:
        return here
    if _target_comes(0.0 if profile else wait_s if before else min(wait_s, COMES_S), say):
        return OnTarget(ready, say)
    if before and profile is None:
        raise BadInput(
            f"--resume: the search measured on a node that carries the resource {TARGET!r}, and "
            "there is none now; wait for it with --wait 20m, or name the profile that it made as "
            "target.profile to go on without"
        )
    later = "latencies are predicted until `flyweight measure RUN_DIR` on the device measures them"
    if profile is None or profile.fingerprint == here.device.fingerprint:
        say(
            f"No node of this cluster carries the resource {TARGET!r}: this machine stands in for "
            f"the device, and {later}"
        )
        return Unmeasured(ready)
    say(f"No node of this cluster carries the resource {TARGET!r}: {later}")
    return Profiled(ready, profile)


def _target_comes(wait_s: float, say: Say) -> bool:
    """Whether a node carries the resource, within ``wait_s`` seconds."""

    def there() -> bool:
        cluster: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        return bool(cluster.get(TARGET))

    text = (
        f"Waiting for a node that carries the resource {TARGET!r}, up to {wait_s:.0f} s "
        "(where none will, name the device's profile as target.profile)"
    )
    return awaited(there, _alone(nothing), wait_s, text, say)


def awaited(there: Callable[[], T], wanted: Any, wait_s: float, text: str, say: Say) -> T:
    """What ``there`` finds, asked again for ``wait_s`` seconds as long as that is nothing. wanted:
    a task that such a node could run, so that an autoscaler knows. text: said where it waits."""
    until, waiting = time.monotonic() + wait_s, None
    while True:
        found = there()
        if found or time.monotonic() >= until:
            if waiting is not None:
                ray.cancel(waiting, force=True)
            return found
        if waiting is None:
            say(text)
            waiting = wanted.remote()
        time.sleep(min(COMING_S, max(0.0, until - time.monotonic())))


def nothing() -> None:
    """A task that only asks for a place."""


class Here(ThisMachine):
    """This machine, in processes of their own. A meter stays for all prices; finalists get one that
    has seen nothing else."""

    there = True

    def __init__(self, ready: Ready) -> None:
        target = ready.spec.target
        super().__init__(target.runtime, target.threads, ready.teacher, ready.request())
        self._meter: Any = None
        self._teacher_ms = 0.0

    def alone(self) -> float:
        self._teacher_ms = float(_get(self._kept().alone.remote()))
        return self._teacher_ms

    def provisional(self, model: bytes) -> tuple[float, float, float]:
        try:
            low, middle, high = _get(self._kept().provisional.remote(model))
        except Died as error:
            self._meter = None
            _, _, teacher, _ = self.start
            _get(self._kept().provisional.remote(teacher))  # else it is not the model
            raise Impossible(f"the runtime dies of it ({error})") from error
        return low, middle, high

    def finalists(self, models: Mapping[str, bytes], alone_ms: float) -> dict[str, Timing] | None:
        self.close()
        meter = self._start()
        try:
            found: dict[str, Timing] = _get(meter.finalists.remote(models, alone_ms))
        finally:
            ray.kill(meter)
        return found

    def close(self) -> None:
        if self._meter is not None:
            ray.kill(self._meter)
            self._meter = None

    def _kept(self) -> Any:
        self._meter = self._meter or self._start()
        return self._meter

    def _start(self) -> Any:
        node = ray.get_runtime_context().get_node_id()
        here = NodeAffinitySchedulingStrategy(node, soft=False)
        options = ray.remote(Meter).options(num_cpus=0, scheduling_strategy=here)
        return options.remote(*self.start, self._teacher_ms)


class Unmeasured(Here):
    """This machine in place of a device that is not there: good for predictions alone."""

    def finalists(self, _: Mapping[str, bytes], __: float) -> None:
        self.close()


class Profiled(Unmeasured):
    """A device that is not there, and what its profile says of it."""

    there = False

    def __init__(self, ready: Ready, profile: DeviceProfile) -> None:
        super().__init__(ready)
        self.device = replace(
            self.device, facts=profile.device, fingerprint=profile.fingerprint,
            weight_bits=profile.weight_bits,
        )  # fmt: skip
        self._profiled_ms = median(timed.teacher_ms for timed in profile.timed)

    def alone(self) -> float:
        return self._profiled_ms

    def provisional(self, _: bytes) -> tuple[float, float, float]:
        raise OSError(f"device {self.device.fingerprint} is not there: nothing can be timed on it")


class OnTarget:
    """The nodes that carry the resource ``target``, of one kind. Each measurement is a task that
    asks for the whole resource: one at a time on a node, and searches take turns. One whose node
    goes is begun anew on another by Ray."""

    there = True

    def __init__(self, ready: Ready, say: Say) -> None:
        target = ready.spec.target
        self._runtime, self._say = (target.runtime, target.threads), say
        # Once, for all measurements; Ray brings them to the node.
        self._teacher, self._feed = ray.put(ready.teacher), ray.put(ready.request())
        self._teacher_ms = 0.0
        self.device: Device = self._wait(_alone(_device).remote(*self._runtime))
        int8 = "int8" in ready.spec.space.quantize.precisions
        if int8 and self.device.int8 != (own := Device.of(ready.prepared.runtime)).int8:
            raise BadInput(
                f"the kernels of the {TARGET} node ({_told(self.device)}) do int8 by "
                f"{self.device.int8}, those of this machine ({_told(own)}) by {own.int8}: "
                "artifacts would be quantized for this one. Run the search from a machine whose "
                "CPU is like the target's, or let space.quantize.precisions be [fp32]"
            )

    def alone(self) -> float:
        self._teacher_ms = self._measure("alone")
        return self._teacher_ms

    def provisional(self, model: bytes) -> tuple[float, float, float]:
        try:
            low, middle, high = self._measure("provisional", model)
        except Died as error:
            self._measure("alone")  # else it is not the model
            raise Impossible(f"the runtime dies of it ({error})") from error
        return low, middle, high

    def finalists(self, models: Mapping[str, bytes], alone_ms: float) -> dict[str, Timing] | None:
        found: dict[str, Timing] = self._measure("finalists", models, alone_ms)
        return found

    @contextlib.contextmanager
    def process(self) -> Iterator[Any]:
        actor = _alone(_Session).remote(self.device, *self._runtime, self._teacher, self._feed)
        try:
            yield _Timing(actor, self._wait)
        finally:
            ray.kill(actor)

    def close(self) -> None:
        """Nothing stays: each measurement gives the node back."""

    def _measure(self, method: str, *arguments: Any) -> Any:
        start = *self._runtime, self._teacher, self._feed, self._teacher_ms
        return self._wait(_alone(_on_target).remote(self.device, method, arguments, *start))

    def _wait(self, answer: Any) -> Any:
        """What a measurement says, however long others measure first."""
        told, gone = False, 0.0
        while not ray.wait([answer], timeout=LOOK_S)[0]:
            cluster: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
            gone = 0.0 if cluster.get(TARGET) else gone + LOOK_S
            if gone >= PATIENCE_S:
                with contextlib.suppress(ValueError):  # an actor's cannot be; its actor is killed
                    ray.cancel(answer, force=True)
                raise OSError(f"no node carries the resource {TARGET!r} any more")
            free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
            if not told and not free.get(TARGET):
                told = True
                self._say(f"Waiting for a {TARGET} node, or for what is measured there")
        return _get(answer)


@dataclass(frozen=True)
class _Timing:
    """A session on a target node, as if it were a MeasuringProcess here."""

    actor: Any
    wait: Callable[[Any], Any]

    def time(self, models: Mapping[str, bytes]) -> dict[str, Timing | None]:
        found: dict[str, Timing | None] = self.wait(self.actor.time.remote(dict(models)))
        return found

    def bears(self, models: Mapping[str, bytes]) -> dict[str, bytes]:
        found: dict[str, bytes] = self.wait(self.actor.bears.remote(dict(models)))
        return found


class _Session:
    """A MeasuringProcess, held by an actor on a target node."""

    def __init__(
        self, device: Device, runtime: str, threads: int, teacher: bytes, feed: Feed
    ) -> None:
        _check_same(device, runtime, threads)
        self.process = MeasuringProcess(runtime, threads, teacher, feed)
        self.process.__enter__()  # it ends with the actor: its pipe is closed then

    def time(self, models: Mapping[str, bytes]) -> dict[str, Timing | None]:
        return self.process.time(models)

    def bears(self, models: Mapping[str, bytes]) -> dict[str, bytes]:
        return self.process.bears(models)


def _device(runtime: str, threads: int) -> Device:
    return Device.of_this(runtime, threads, ray.get_runtime_context().get_node_id())


def _on_target(
    device: Device, method: str, arguments: tuple[Any, ...], runtime: str, threads: int,
    teacher: bytes, feed: Feed, teacher_ms: float,
) -> Any:  # fmt: skip
    _check_same(device, runtime, threads)
    return getattr(Meter(runtime, threads, teacher, feed, teacher_ms), method)(*arguments)


def _check_same(device: Device, runtime: str, threads: int) -> None:
    """Raises FlyweightError on a node of another kind than ``device``."""
    if (found := _device(runtime, threads)).fingerprint != device.fingerprint:
        raise FlyweightError(
            f"nodes of two kinds carry the resource {TARGET!r}: {_told(device)}, and "
            f"{_told(found)}; give it to one kind"
        )


def _alone(what: Any) -> Any:
    """``what``, a function or a class, with a target node to itself."""
    return ray.remote(what).options(num_cpus=0, resources={TARGET: 1})


def _told(device: Device) -> str:
    return ", ".join(f"{key}={value}" for key, value in device.facts.items())


def _get(answer: Any) -> Any:
    """What a Ray call returns. Raises Impossible and BadInput if it raised them, else OSError."""
    try:
        return ray.get(answer)
    except ray.exceptions.RayTaskError as error:
        if isinstance(cause := error.cause, Impossible | BadInput):
            raise cause from error
        if isinstance(cause, FlyweightError):
            raise OSError(str(cause)) from error
        raise OSError(f"measuring failed: {str(error).strip().splitlines()[-1]}") from error
    except ray.exceptions.RayError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        # Of an actor that could not begin, the last line is what it raised.
        reason = lines[-1 if getattr(error, "actor_init_failed", False) else 0]
        raise Died(f"what measured was lost: {reason}") from error


def trial_request(resources: Resources) -> dict[str, float]:
    """What a trial asks of a node, in Ray's words."""
    asked = {
        "CPU": resources.cpus, "GPU": resources.gpus, "memory": float(resources.memory_bytes or 0),
        f"accelerator_type:{resources.accelerator}": 0.001 if resources.accelerator else 0.0,
    }  # fmt: skip
    return {name: amount for name, amount in asked.items() if amount}


def for_actor(resources: Resources) -> dict[str, Any]:
    """The same as the options of a Ray actor or task."""
    request = trial_request(resources)
    return {
        "num_cpus": request.pop("CPU", 0), "num_gpus": request.pop("GPU", 0),
        "memory": request.pop("memory", None), "resources": request or None,
    }  # fmt: skip
