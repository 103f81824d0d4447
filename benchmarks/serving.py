"""What serving costs: against the bare runtime, against an echo on the same engine, under change.

    python benchmarks/serving.py RUN_DIR [--rounds 5] [--seconds 5] [--fuzz 10000]
                                         [--parts overhead throughput update fuzz]

The small artifact is the best of RUN_DIR (a search of examples/fashion_mnist); the large one is a
chain of convolutions made here, of about a hundred times its work, with the same input. Clients are
a process of their own. Rounds of what is compared are interleaved, on one Ray Serve.

overhead    one client, one image a request in JSON: its median, less that of the bare runtime
throughput  32 clients: requests a second, beside an echo of the same payload (FastAPI on Ray Serve,
            the same settings), with batches and without
update      32 clients while the model is replaced and put back, over and over
fuzz        requests made up by schemathesis from the OpenAPI description; memory of the replica
"""

import argparse
import hashlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import write

from flyweight.kernels import make_runtime
from flyweight.search.local_ray import started
from flyweight.search.serve import Options, deploy, ray_serve
from flyweight.search.serve_source import Source, read_path

SHAPE = (1, 28, 28)
CLIENTS = 32
PARTS = ("overhead", "throughput", "update", "fuzz")


def large(folder: Path, channels: int = 128, layers: int = 10) -> Source:
    """An artifact of ``layers`` convolutions of 3 x 3, [N, 1, 28, 28] -> [N, 10]."""
    from onnx import TensorProto, helper, numpy_helper

    rng, nodes, weights, before = np.random.default_rng(0), [], [], ("input", 1)
    for i in range(layers):
        shape = (channels, before[1], 3, 3)
        scale = np.sqrt(2 / (9 * before[1]))
        weight = (rng.normal(size=shape) * scale).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{i}"))
        nodes.append(helper.make_node("Conv", [before[0], f"w{i}"], [f"c{i}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"r{i}"]))
        before = (f"r{i}", channels)
    head = (rng.normal(size=(channels, 10)) * 0.1).astype(np.float32)
    weights.append(numpy_helper.from_array(head, "head"))
    nodes.append(helper.make_node("GlobalAveragePool", [before[0]], ["pool"]))
    nodes.append(helper.make_node("Flatten", ["pool"], ["flat"]))
    nodes.append(helper.make_node("MatMul", ["flat", "head"], ["output"]))
    float32 = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("input", float32, ["batch", *SHAPE])],
        [helper.make_tensor_value_info("output", float32, ["batch", 10])],
        weights,
    )
    opset = [helper.make_opsetid("", 20)]
    content = helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()
    (folder / "model.onnx").write_bytes(content)
    facts = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "digest": hashlib.sha256(content).hexdigest(),
        "target": {"runtime": "onnxruntime", "threads": 1},
    }
    (folder / "metrics.json").write_text(json.dumps(facts))
    return read_path(folder)


def payload() -> bytes:
    """One image as a client sends it: pixels to four digits."""
    pixels = np.random.default_rng(0).random(SHAPE).round(4).ravel().tolist()
    tensor = {"name": "input", "shape": [1, *SHAPE], "datatype": "FP32", "data": pixels}
    return json.dumps({"inputs": [tensor]}).encode()


def begin_load(url: str, body: Path, count: int, seconds: float) -> "subprocess.Popen[str]":
    clients = Path(__file__).with_name("http_clients.py")
    words = [sys.executable, str(clients), url, str(body), str(count), str(seconds)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def load(url: str, body: Path, count: int, seconds: float) -> dict[str, Any]:
    """What ``count`` clients found in ``seconds``."""
    process = begin_load(url, body, count, seconds)
    out, _ = process.communicate()
    assert process.returncode == 0
    found: dict[str, Any] = json.loads(out)
    return found


def echo(options: Options) -> Any:
    """The same engine, answering with what it was sent."""
    from fastapi import FastAPI, Request, Response

    app = FastAPI()

    class Echo:
        @app.post("/")
        async def answer(self, request: Request) -> Response:
            return Response(await request.body(), media_type="application/json")

    return ray_serve.deployment(
        max_ongoing_requests=2 * options.batch,
        max_queued_requests=options.queue,
        ray_actor_options={"num_cpus": 1},
        logging_config={"enable_access_log": False},
    )(ray_serve.ingress(app)(Echo)).bind()


class Bench:
    def __init__(self, options: Options, body: Path, rounds: int, seconds: float) -> None:
        self.options, self.body, self.rounds, self.seconds = options, body, rounds, seconds
        self.url = f"http://127.0.0.1:{options.port}"
        self.infer = f"{self.url}/v2/models/{options.name}/infer"

    def overhead(self, source: Source) -> dict[str, Any]:
        """Median ms of one client, and of the bare runtime, in turns."""
        deploy(source, self.options)
        session = make_runtime(source.runtime, source.threads).load(source.content)
        asked = json.loads(self.body.read_bytes())["inputs"][0]
        inputs = {"input": np.asarray(asked["data"], np.float32).reshape(asked["shape"])}
        load(self.infer, self.body, 1, 1)
        rounds = []
        for _ in range(self.rounds):
            bare = []
            until = time.perf_counter() + self.seconds / 2
            while (begun := time.perf_counter()) < until:
                session.run(inputs)
                bare.append((time.perf_counter() - begun) * 1e3)
            served = load(self.infer, self.body, 1, self.seconds)
            alone = load(f"{self.url}/echo/", self.body, 1, self.seconds)
            rounds.append({
                "bare_ms": statistics.median(bare), "served_ms": served["median_ms"],
                "echo_ms": alone["median_ms"], "p99_ms": served["p99_ms"],
            })  # fmt: skip
        over = [each["served_ms"] - each["bare_ms"] for each in rounds]
        return {"overhead_ms": statistics.median(over), "range_ms": spread(over), "rounds": rounds}

    def throughput(self, source: Source) -> dict[str, Any]:
        """Requests a second of 32 clients: with batches, without, and the echo's, in turns."""
        ways = {
            "batches": self.options,
            "batches after 5 ms": replace(self.options, batch_delay_ms=5.0),
            "no batches": replace(self.options, batch=1),
        }
        found: dict[str, list[float]] = {way: [] for way in (*ways, "echo")}
        for _ in range(self.rounds):
            for way, options in ways.items():
                deploy(source, options)
                load(self.infer, self.body, CLIENTS, 1)
                found[way].append(load(self.infer, self.body, CLIENTS, self.seconds)["per_second"])
            found["echo"].append(
                load(f"{self.url}/echo/", self.body, CLIENTS, self.seconds)["per_second"]
            )

        def against(way: str, other: str) -> dict[str, Any]:
            ratios = [a / b for a, b in zip(found[way], found[other], strict=True)]
            return {"median": statistics.median(ratios), "range": spread(ratios)}

        return {
            "per_second": {way: statistics.median(each) for way, each in found.items()},
            "against echo": {way: against(way, "echo") for way in ways},
            "batches against none": {way: against(way, "no batches") for way in [*ways][:2]},
            "rounds": found,
        }

    def update(self, first: Source, second: Source) -> dict[str, Any]:
        """32 clients while the model is replaced and put back, ``rounds`` times."""
        deploy(first, self.options)
        clients = begin_load(self.infer, self.body, CLIENTS, self.rounds * 30.0)
        changes = 0
        while clients.poll() is None:
            deploy((second, first)[changes % 2], self.options)
            changes += 1
        out, _ = clients.communicate()
        return {"changes": changes, **json.loads(out)}

    def fuzz(self, source: Source, count: int) -> dict[str, Any]:
        """``count`` made-up requests: how they were answered, and the replica's memory."""
        import schemathesis
        from hypothesis import HealthCheck, Phase, given, seed, settings, strategies

        deploy(source, self.options)
        load(self.infer, self.body, CLIENTS, 5)
        schema = schemathesis.openapi.from_url(f"{self.url}/openapi.json")
        infer = schema[f"/v2/models/{self.options.name}/infer"]["POST"]
        modes = schemathesis.GenerationMode
        cases = [infer.as_strategy(generation_mode=m) for m in (modes.POSITIVE, modes.NEGATIVE)]
        told: dict[int, int] = {}
        memory, longest = [memory_mb()], 0.0
        begun = time.perf_counter()
        for number in range(0, count, 500):  # anew each time: Hypothesis remembers all it tried

            @seed(number)
            @settings(
                max_examples=500, deadline=None, database=None, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(case=strategies.one_of(cases))
            def check(case: Any) -> None:
                nonlocal longest
                asked = time.perf_counter()
                got = case.call(timeout=30)
                longest = max(longest, time.perf_counter() - asked)
                told[got.status_code] = told.get(got.status_code, 0) + 1
                assert got.status_code < 500, got.text

            check()
            memory.append(memory_mb())
            print(f"{sum(told.values())} requests: {told}, MB {memory[-1]}", flush=True)
        return {
            "requests": sum(told.values()),
            "answers": told,
            "longest_s": longest,
            "seconds": time.perf_counter() - begun,
            "memory_mb": memory,
        }


def spread(values: list[float]) -> list[float]:
    return [min(values), max(values)]


def memory_mb() -> dict[str, float]:
    """Resident memory of the newest replica of the model and of the proxy."""
    found: dict[str, float] = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            title = (place / "cmdline").read_bytes().split(b"\0")[0].decode()
            pages = int((place / "statm").read_text().split()[1])
        except (OSError, UnicodeDecodeError):
            continue
        for name in ("ServeReplica:model", "ProxyActor"):
            if name in title:
                found[name] = round(pages * os.sysconf("SC_PAGESIZE") / 1e6, 1)
    return found


@contextmanager
def engine(options: Options) -> Iterator[None]:
    with started(8, None):
        ray_serve.start(
            proxy_location="HeadOnly",
            http_options={"host": options.host, "port": options.port},
            logging_config={"enable_access_log": False},
        )
        ray_serve.run(echo(options), name="echo", route_prefix="/echo")
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--fuzz", type=int, default=10_000)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    given = parser.parse_args()
    given.run_dir = given.run_dir.resolve()  # Ray's driver works in another folder
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        options = Options(port=probe.getsockname()[1])
    with tempfile.TemporaryDirectory() as place, engine(options):
        folder = Path(place)
        body = folder / "body.json"
        body.write_bytes(payload())
        bench = Bench(options, body, given.rounds, given.seconds)
        sources = {"small": read_path(given.run_dir), "large": large(folder)}
        figures: dict[str, Any] = {"payload_bytes": len(payload())}
        for part in given.parts:
            if part == "update":
                # The same artifact under another name: only the engine is in question.
                figures[part] = bench.update(
                    sources["small"], replace(sources["small"], version="other")
                )
            elif part == "fuzz":
                figures[part] = bench.fuzz(sources["small"], given.fuzz)
            else:
                figures[part] = {
                    size: getattr(bench, part)(source) for size, source in sources.items()
                }
            print(part, json.dumps(figures[part], indent=1), flush=True)
            print(write(f"serving-{part}", {part: figures[part]}), flush=True)


if __name__ == "__main__":
    main()
