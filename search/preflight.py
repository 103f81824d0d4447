"""What is found out about a cluster before a search costs anything: whether its nodes can run the
trials at all, and whether each of them has what a trial needs."""

import platform
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..spaces import BadInput, FlyweightError
from .meter import Device
from .placement import awaited, for_actor, nothing, trial_request
from .ready import Ready
from .spec import Resources, Spec
from .storage import Storage
from .tracking import redact

PATIENCE_S = 300.0  # for a node to say what it has: its first import of torch takes long
MARKS = "reached"  # where nodes show that they can write
PACKAGES = ("ray", "flyweight")  # whose versions must be the driver's
UNITS = {"CPU": "CPUs", "GPU": "GPUs", "memory": "GB of memory"}

Say = Callable[[str], None]
Node = Mapping[str, Any]


def check_cluster(ready: Ready, storage: Storage, local: bool, wait_s: float, say: Say) -> None:
    """Raises BadInput if no node can run a trial of ``ready`` (after ``wait_s`` seconds), or if one
    that can lacks something, or if this process cannot write to a storage that the spec names.
    storage: that trials write to. local: Ray is of this machine alone, which has what the search
    has."""
    resources = ready.spec.resources
    if ready.spec.storage is not None:
        _check_storage(storage, ready.spec.storage)
    wanted = ray.remote(nothing).options(**for_actor(resources))
    text = f"Waiting for a node with {_asked(resources)}"
    nodes = awaited(lambda: _fitting(resources), wanted, 0.0 if local else wait_s, text, say)
    if not nodes:
        wait = "" if local else "; for nodes that an autoscaler still brings, give --wait 20m"
        raise BadInput(
            f"resources: a trial asks for {_asked(resources)}, but no node has that; there is "
            f"{_there()}{wait}"
        )
    if not local:
        say(f"Checking {len(nodes)} nodes that can run trials")
        _check_nodes(nodes, ready, storage)


def _check_storage(storage: Storage, place: str) -> None:
    try:
        storage.write(f"{MARKS}/driver", b"")
    except OSError as error:
        what = redact(f"{place} cannot be written: {error}", place)
        raise BadInput(f"storage: {what}") from error
    storage.remove(MARKS)


def _fitting(resources: Resources) -> list[Node]:
    """The nodes that could run a trial if nothing else ran there."""
    asked = trial_request(resources)
    return [
        node
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"] and all(node["Resources"].get(k, 0) >= v for k, v in asked.items())
    ]


def _asked(resources: Resources) -> str:
    return ", ".join(_words(name, n) for name, n in trial_request(resources).items())


def _words(name: str, amount: float) -> str:
    if name.startswith("accelerator_type:"):
        return f"a GPU of type {name.partition(':')[2]}"
    amount /= 1e9 if name == "memory" else 1
    return f"{round(amount, 2):,.12g} {UNITS[name]}"


def _there() -> str:
    """What the nodes have, a phrase for each."""
    phrases = []
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["Alive"]:
            has = {
                k: v
                for k, v in sorted(node["Resources"].items())
                if k in UNITS or k.startswith("accelerator_type:")
            }
            phrases.append(" and ".join(_words(k, v) for k, v in has.items()) or "nothing")
    counts = {phrase: phrases.count(phrase) for phrase in phrases}
    return "; ".join(f"{n} x ({phrase})" for phrase, n in counts.items()) or "no node"


def _check_nodes(nodes: list[Node], ready: Ready, storage: Storage) -> None:
    """Asks every node for what a trial needs. Raises BadInput with what is missing, and where."""
    spec, own = ready.spec, facts(ready.spec)
    answers = {}
    for node in nodes:
        where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        # It takes no CPU of the node: a cluster that is busy is asked too.
        task: Any = ray.remote(facts)
        task = task.options(num_cpus=0, scheduling_strategy=where, max_retries=0)
        answers[task.remote(spec, storage, node["NodeID"])] = node
    problems: dict[str, list[str]] = {}
    ray.wait([*answers], num_returns=len(answers), timeout=PATIENCE_S)
    seen = _seen(storage)
    there = {node["NodeID"] for node in _fitting(ready.spec.resources)}  # a spot node may be gone
    for answer, node in answers.items():
        if there and node["NodeID"] not in there:
            continue
        for problem in _problems(answer, own, node["NodeID"] in seen):
            problems.setdefault(problem, []).append(node["NodeManagerAddress"])
    if problems:
        lines = [f"  {', '.join(sorted({*at}))}: {what}" for what, at in problems.items()]
        raise BadInput("the cluster cannot run this search:\n" + "\n".join(lines))


def _seen(storage: Storage) -> set[str]:
    """What nodes left in ``storage``, which is then as before."""
    try:
        return set(storage.names(MARKS))
    except OSError:  # then nothing of theirs is seen here
        return set()
    finally:
        storage.remove(MARKS)


def _problems(answer: Any, own: dict[str, str], seen: bool) -> list[str]:
    """What a node's ``answer`` says that would not do. seen: whether what it wrote is there."""
    if not ray.wait([answer], timeout=0)[0]:
        return [f"it did not answer within {PATIENCE_S:g} s"]
    try:
        found: dict[str, str] = ray.get(answer)
    except ray.exceptions.RayError as error:
        return [f"it failed: {str(error).strip().splitlines()[-1]}"]
    return lacking(found, own, seen)


def lacking(found: Mapping[str, str], own: Mapping[str, str], seen: bool) -> list[str]:
    """What a node has not, by what it (``found``) and the driver (``own``) say of themselves, see
    ``facts``. seen: whether what it wrote is there."""
    out = [
        f"{name} is {found[name]}, but {own[name]} on the driver"
        for name in own
        if name in found and found[name] != own[name]
    ]
    if "problem" in found:
        out.append(found["problem"])
    if "unwritable" in found:
        out.append(f"it cannot write what a trial makes: {found['unwritable']}")
    elif not seen:
        out.append(
            "what it writes is not seen here, so artifacts would be lost; name a storage in the "
            "spec that all nodes reach, or put --out on a file system that they share"
        )
    return out


def facts(spec: Spec, storage: Storage | None = None, mark: str = "") -> dict[str, str]:
    """What a process has of what a trial of ``spec`` needs. storage: where it leaves ``mark``, so
    that the driver sees whether it can. problem: why the task or its runtime cannot be had."""
    # Pickles are of a minor version; Ray takes nodes of other patches.
    found = {"Python": ".".join(platform.python_version_tuple()[:2])}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    if storage is not None:
        try:
            storage.write(f"{MARKS}/{mark}", b"")
        except OSError as error:
            found["unwritable"] = redact(str(error), spec.storage or "")
    try:
        device = Device.of_this(spec.target.runtime, spec.target.threads)
        if "int8" in spec.space.quantize.precisions:
            # Artifacts are quantized, run and scored by workers: as the driver plans them.
            found["int8"] = device.int8
        if storage is not None:
            with spec.loaded_task():
                pass
    except FlyweightError as error:
        found["problem"] = str(error)
    return found
