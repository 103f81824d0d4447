"""``flyweight serve``: a model is found, verified, deployed on Ray Serve and answers HTTP.

find      an artifact's folder, file or alias -> Source: content that is what was scored
Replica   Source -> a warm model in its target's runtime, which answers in batches
deploy    replicas behind Ray Serve's proxy; a newer Source beside the old until it is warm
serve     all of it, until Ctrl-C; where MODEL is an alias, follows where it points
"""

import asyncio
import logging
import math
import re
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from fastapi import FastAPI
from ray import serve as ray_serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from ..kernels import Array, Inputs
from ..spaces import BadInput, FlyweightError
from .local_ray import started, terminable
from .registries import registry_of
from .serve_http import make_app
from .serve_model import ServedModel
from .serve_protocol import Protocol, tensors
from .serve_source import NAME, Source, alias_of, read_path, read_registered

if TYPE_CHECKING:
    from .registry import Registry

LOOPBACK = ("127.0.0.1", "::1", "localhost")
REQUEST_S = 60.0  # a request that takes longer is answered with 408
GPU = ("onnxruntime-cuda", "onnxruntime-tensorrt")  # Ray hides GPUs from who asks for none
ONGOING = 2  # batches' worth of requests that a replica holds: one that runs, one that gathers


@dataclass(frozen=True)
class Options:
    """How to serve. batch: rows that run together at most. batch_delay_ms: how long a request waits
    for others. queue: requests that wait for a replica at most; further ones get 503. replicas,
    max_replicas: as many, more under load up to the latter. poll_s: between looks at the alias."""

    name: str = "model"
    host: str = "127.0.0.1"
    port: int = 8000
    batch: int = 16
    batch_delay_ms: float = 0.0
    max_body_mb: float = 32.0
    queue: int = 256
    replicas: int = 1
    max_replicas: int = 1
    poll_s: float = 5.0


class Replica:
    """What Ray Serve starts as a process: one verified, warm model behind the protocol.

    One thread runs the model, so that a replica uses the target's threads and no more; the event
    loop reads and writes requests meanwhile.
    """

    def __init__(self, source: "ray.ObjectRef[Source]", options: Options) -> None:
        self._options = options
        self._model = ServedModel(ray.get(source), options.batch)
        compute = ThreadPoolExecutor(1)

        async def answer(requests: list[Inputs]) -> list[Array | FlyweightError]:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(compute, self._model.answer, requests)

        def rows(requests: list[Inputs]) -> int:
            sizes = (len(next(iter(inputs.values()))) for inputs in requests)
            return sum(min(size, options.batch) for size in sizes)  # larger ones run alone

        self._answer = answer
        self._batched = ray_serve.batch(
            max_batch_size=options.batch,
            batch_wait_timeout_s=options.batch_delay_ms / 1000,
            batch_size_fn=rows,
        )(answer)

    def __serve_build_asgi_app__(self) -> FastAPI:
        source = self._model.source
        protocol = Protocol(
            self._options.name,
            source.version,
            tensors(source.io["inputs"]),
            tensors(source.io["outputs"]),
        )
        most = int(self._options.max_body_mb * 1e6)
        return make_app(protocol, f"{source.runtime}_onnx", self._infer, most)

    async def _infer(self, inputs: Inputs) -> Array:
        if self._options.batch > 1 and self._model.batches:
            found = await self._batched(inputs)
        else:
            (found,) = await self._answer([inputs])
        if isinstance(found, FlyweightError):
            raise found
        return found


def find(model: str, tracking_uri: str | None) -> tuple[Source, "Registry | None"]:
    """What MODEL names, verified, and the registry to follow if it is an alias."""
    if (alias := alias_of(model)) is None:
        return read_path(Path(model)), None
    registry = registry_of(*alias, tracking_uri)
    return read_registered(registry, registry.current()), registry


def deploy(source: Source, options: Options) -> None:
    """Replicas of ``source``, in place of those that serve: old ones go when new ones are warm.

    Raises FlyweightError if they do not start; those before go on serving.
    """
    scale: dict[str, Any] = {"num_replicas": options.replicas}
    ongoing = max(ONGOING * options.batch, 16)
    if options.max_replicas > options.replicas:
        scale = {
            "autoscaling_config": {
                "min_replicas": options.replicas,
                "max_replicas": options.max_replicas,
                "target_ongoing_requests": ongoing / 2,
            }
        }
    deployment = ray_serve.deployment(
        name="replica",
        ray_actor_options={
            "num_cpus": source.threads,
            "num_gpus": int(source.runtime in GPU),
        },
        max_ongoing_requests=ongoing,
        max_queued_requests=options.queue,
        max_surge_percent=100,
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=REQUEST_S,
        logging_config={"enable_access_log": False},
        **scale,
    )(ray_serve.ingress()(Replica))
    app = deployment.bind(ray.put(source), options)
    try:
        ray_serve.run(app, name=options.name, route_prefix="/")
    except (RuntimeError, RayError, RayServeException) as error:
        raise FlyweightError(f"{source.where} does not start: {_reason(options, error)}") from error


def _reason(options: Options, error: Exception) -> str:
    """The line that says what went wrong, of the traceback that Ray Serve keeps from a replica."""
    told = str(error)
    if (app := ray_serve.status().applications.get(options.name)) and app.deployments:
        told = next(iter(app.deployments.values())).message or told
    found = re.findall(r"^[\w.]*(?:Error|Impossible|BadInput): (.+)$", told, re.MULTILINE)
    return str(found[-1]) if found else told.strip().splitlines()[-1]


def serve(
    model: str,
    options: Options,
    *,
    tracking_uri: str | None = None,
    address: str | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Serves MODEL until Ctrl-C or SIGTERM; what was accepted until then is answered.

    Raises BadInput for what cannot be served, before Ray starts; FlyweightError if it is not what
    was scored or does not start.
    """
    _check(options, listens=address is None)
    source, registry = find(model, tracking_uri)
    tensors([*source.io["inputs"], *source.io["outputs"]])  # whether JSON can hold them
    for note in source.notes:
        say(f"Note: {note}")
    if options.host not in LOOPBACK:
        say(
            f"Warning: on {options.host} whoever reaches this machine can ask the model; it knows "
            "no passwords and no TLS. Put a proxy that does before it."
        )
    cpus = 2 * max(options.replicas, options.max_replicas) * source.threads  # old beside new
    with terminable(), started(cpus, address):
        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # we say it ourselves
        say(f"Starting Ray Serve for {source.where} (SHA-256 {source.sha256[:12]}, as recorded)")
        ray_serve.start(
            proxy_location="EveryNode" if address else "HeadOnly",
            http_options={
                "host": options.host,
                "port": options.port,
                "request_timeout_s": REQUEST_S,
            },
            logging_config={"enable_access_log": False},
        )
        try:
            deploy(source, options)
            for line in _where(source, options):
                say(line)
            room = math.inf if address else ray.cluster_resources()["CPU"]  # type: ignore[no-untyped-call]
            _follow(source, registry, options, say, room)
        except KeyboardInterrupt:
            say("Ending: no new requests; what was accepted is answered")
        finally:
            stop(options, shared=address is not None)


def stop(options: Options, *, shared: bool) -> None:
    """Ends what answers for the model, once it has answered what it accepted. A Ray of one's own
    ends next, and Serve with it; on a ``shared`` one Serve stays for others, if there are any."""
    if options.name in ray_serve.status().applications:
        ray_serve.delete(options.name)
    if shared and not ray_serve.status().applications:
        ray_serve.shutdown()  # type: ignore[no-untyped-call]  # Ray's own, without types


def _check(options: Options, *, listens: bool) -> None:
    if not NAME.fullmatch(options.name):
        raise BadInput(
            "--name must begin with a letter or digit and go on with those and _.-, but got "
            f"{options.name!r}"
        )
    if not listens:  # a Serve that runs on the cluster may listen there already
        return
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((options.host, options.port))
        except OSError as error:
            raise BadInput(
                f"--host, --port: {options.host}:{options.port} cannot be listened on ({error}); "
                "give another"
            ) from error


def _where(source: Source, options: Options) -> list[str]:
    host = f"[{options.host}]" if ":" in options.host else options.host
    url = f"http://{host}:{options.port}"
    node = ray.nodes()[0]  # type: ignore[no-untyped-call]  # Ray's own, without types
    return [
        f"Ready: {url}/v2/models/{options.name} (version {source.version}, {source.runtime}, "
        f"{source.threads} thread{'s' * (source.threads > 1)}); Ctrl-C ends it",
        f"Metrics for Prometheus: http://127.0.0.1:{node['MetricsExportPort']}/metrics",
    ]


def _follow(
    source: Source,
    registry: "Registry | None",
    options: Options,
    say: Callable[[str], None],
    room: float,
) -> None:
    """Waits; where there is a registry, serves what its alias names, as soon as it names another.
    room: CPUs that there are to serve with, for as long as this serves.

    A registry that does not answer, or a version that is not what it should be, changes nothing.
    """
    refused = trouble = ""
    while True:
        time.sleep(options.poll_s)
        if registry is None:
            continue
        try:
            version = registry.current()
            if version in (source.version, refused):
                trouble = ""
                continue
            new = read_registered(registry, version)
        except FlyweightError as error:  # looked for again, and said once
            if str(error) != trouble:
                trouble = str(error)
                say(f"{trouble}; version {source.version} goes on")
            continue
        trouble = ""
        try:
            source = _replace(source, new, options, room)
            say(f"Version {version} serves now (SHA-256 {source.sha256[:12]})")
        except FlyweightError as error:
            refused = version
            say(f"Version {version} is refused, version {source.version} goes on: {error}")


def _replace(old: Source, new: Source, options: Options, room: float) -> Source:
    if new.io != old.io:
        raise BadInput(
            "its inputs and outputs are others, which clients do not expect; serve it under "
            "another name or end this one first"
        )
    beside = max(options.replicas, options.max_replicas) * (old.threads + new.threads)
    if beside > room:  # Ray Serve would wait for CPUs for ever
        raise BadInput(
            f"it is of {new.threads} threads a replica, for which the {room:g} CPUs that this "
            "serves with have no room beside the version before; end this one and serve again"
        )
    try:
        deploy(new, options)
    except FlyweightError:
        deploy(old, options)  # else a replica that dies would be replaced by the new version
        raise
    return new
