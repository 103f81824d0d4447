"""What a policy costs at the recalibrate rung: seconds on one core, its parts, and memory.

    python benchmarks/compress.py [--rounds 7] [--skip-memory] [--skip-mobilenet]

Times: ``compress`` of the Fashion-MNIST network, export and scoring included, several policies,
interleaved round by round in one process on one thread; wall seconds and seconds of the CPU. What
is worked out once a process (the trace, importances, moments, the teacher's answers) is told
apart. The surgery alone stands beside torch-pruning's, on the same channels.

Memory: a fresh process for each policy. Before ``compress`` the allocator gives back what is free
(malloc_trim) and the kernel forgets the peak (/proc/self/clear_refs, Linux); after it the peak of
resident memory (VmHWM) less what was resident before is what ``compress`` took on top. The second
of two calls counts: the first also loads libraries. The peak of torch's own tensors within each
part comes from the same process, by torch's profiler.

MobileNetV2 at 224 x 224, with random weights and images, shows how tracing and preparing grow.
"""

import argparse
import contextlib
import copy
import ctypes
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import LIBRARIES, machine, versions, write

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RUNG = "recalibrate"
LIMIT_S = 1.0  # of one core, a policy at the recalibrate rung
LIMIT_MODELS = 3  # peak memory in models, plus one batch
BATCH = 128  # items that statistics are recomputed from at once: the largest batch of compress
IMAGES = 256  # of 224 x 224 for MobileNetV2, for training and validation each
# The steps of compress, by the names under which its module calls them.
PARTS = (
    "remove", "reconstruct_", "recompute_statistics", "fold_norms",
    "insert_quantizers", "equalize", "calibrate", "correct_", "settle", "freeze", "to_onnx",
    "_answers",
)  # fmt: skip
Clock = Callable[[], float]


def fashion() -> Any:
    """The reference task, prepared."""
    import torch

    from flyweight.compressors import Schedule, load_task, prepare
    from flyweight.kernels import make_runtime

    torch.set_num_threads(1)
    task = load_task("fashion_mnist/task.py:FashionMnist", EXAMPLES, {"data": "embedded"})
    return prepare(task, make_runtime("onnxruntime", 1), Schedule())


def policies(prepared: Any) -> dict[str, Any]:
    """The policies to compare, by name."""
    from dataclasses import replace

    from flyweight.spaces import Policy, Settings, Space

    space = Space(prepared.network, prepared.runtime.capabilities, Settings())
    whole, half = space.uniform(1.0, "int8").quantize, space.uniform(0.5).prune
    pruned = replace(half, criterion="taylor", reconstruct=True)
    mse, fitted = (replace(whole, calibration=how) for how in ("mse", "fitted"))
    return {
        "fp32, full width": Policy(),
        "fp32, half width": Policy(prune=pruned),
        "int8, full width": Policy(quantize=mse),
        "int8, half width": Policy(prune=pruned, quantize=mse),
        "int8, half width, fitted": Policy(prune=pruned, quantize=fitted),
    }


class Parts:
    """Seconds that the steps of ``compress`` take: their own, without the steps within them."""

    def __init__(self, clock: Clock) -> None:
        self.seconds: dict[str, float] = {}
        self._clock, self._inner = clock, [0.0]

    @contextlib.contextmanager
    def watching(self, runtime: Any) -> Iterator[None]:
        """While it lasts the steps are timed."""
        from flyweight.compressors import compress as function

        module = sys.modules[function.__module__]
        held = {name: getattr(module, name) for name in PARTS}
        load = type(runtime).load
        try:
            for name, step in held.items():
                setattr(module, name, self._timed(name, step))
            type(runtime).load = self._timed("load", load)
            yield
        finally:
            for name, step in held.items():
                setattr(module, name, step)
            type(runtime).load = load

    def _timed(self, name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(step)
        def call(*args: Any, **kwargs: Any) -> Any:
            began = self._clock()
            self._inner.append(0.0)
            try:
                return step(*args, **kwargs)
            finally:
                took = self._clock() - began
                own = took - self._inner.pop()
                self._inner[-1] += took
                self.seconds[name] = self.seconds.get(name, 0.0) + own

        return call


def stopwatch(function: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Wall and CPU seconds of this process, all threads, and what ``function`` gives."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}, result


# -- seconds -------------------------------------------------------------------------------------


def timed_compress(rounds: int) -> dict[str, Any]:
    from flyweight.compressors import compress

    once: dict[str, Any] = {}
    once["prepare"], prepared = stopwatch(fashion)
    once["teacher's answers"], _ = stopwatch(lambda: prepared.search_answers)
    once["importance (taylor)"], _ = stopwatch(lambda: prepared.importance("pruned", "taylor"))
    once["moments"], _ = stopwatch(lambda: prepared.input_moments("pruned"))
    chosen = policies(prepared)
    once["first compress"], _ = stopwatch(
        lambda: compress(prepared, chosen["int8, half width"], "recalibrate")
    )
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    for _ in range(rounds):
        for name, policy in chosen.items():
            parts = Parts(time.process_time)
            with parts.watching(prepared.runtime):
                figures, made = stopwatch(functools.partial(compress, prepared, policy, RUNG))
            left = figures["cpu_s"] - sum(parts.seconds.values())
            runs[name].append({**figures, "parts": {**parts.seconds, "the rest": left}})
            runs[name][-1]["loss"] = made.loss
    return {"once": once, "runs": runs}


def timed_surgery(rounds: int, make: Callable[[], tuple[Any, Any]]) -> dict[str, list[float]]:
    """CPU seconds of the surgery that halves every group, by both; the same channels."""
    import torch
    import torch_pruning as tp

    from flyweight.compressors.prune import remove
    from flyweight.spaces.tracing import trace

    model, example = make()
    network = trace(model, example)
    kept = {n: torch.tensor(g.first(g.width // 2)) for n, g in network.groups.items()}
    gone = {n: list(range(g.width // 2, g.width)) for n, g in network.groups.items()}
    seconds: dict[str, list[float]] = {}

    def note(what: str, function: Callable[[], Any]) -> Any:
        figures, result = stopwatch(function)
        seconds.setdefault(what, []).append(figures["cpu_s"])
        return result

    def prune(graph: Any, victim: Any) -> None:
        for name, channels in gone.items():
            layer = victim.get_submodule(name)
            graph.get_pruning_group(layer, tp.prune_conv_out_channels, channels).prune()

    for _ in range(rounds):
        note("flyweight: trace", lambda: trace(model, example))
        student = note("flyweight: remove", lambda: remove(model, network, example, kept))
        victim = note("torch-pruning: copy", lambda: copy.deepcopy(model).requires_grad_())
        graph = note(
            "torch-pruning: graph",
            lambda v=victim: tp.DependencyGraph().build_dependency(v, example, verbose=False),
        )
        note("torch-pruning: prune", lambda g=graph, v=victim: prune(g, v))
        with torch.no_grad():
            torch.testing.assert_close(student(example), victim(example))
    return seconds


def resnet() -> tuple[Any, Any]:
    import torch

    prepared = fashion()
    return prepared.teacher, torch.as_tensor(prepared.example)


def mobilenet() -> tuple[Any, Any]:
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(EXAMPLES / "imagenet"))
    from mobilenet_v2 import MobileNetV2

    torch.manual_seed(0)
    return MobileNetV2().eval(), torch.rand(1, 3, 224, 224)


class Noise:
    """Random images as a data set, made as examples/imagenet makes its own."""

    def __init__(self) -> None:
        import numpy as np

        rng = np.random.default_rng(0)
        self.images = rng.integers(0, 256, (IMAGES, 224, 224, 3), np.uint8)
        self.targets = rng.integers(0, 10, IMAGES)

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> tuple[Any, int]:
        import numpy as np
        import torch

        pixels = torch.from_numpy(self.images[index].astype(np.float32)).permute(2, 0, 1)
        return (pixels / 128 - 1).contiguous(), int(self.targets[index])


def timed_mobilenet() -> dict[str, dict[str, float]]:
    """What comes before the first policy of MobileNetV2, in a fresh process."""
    from flyweight.compressors import ClassificationTask, Schedule, prepare
    from flyweight.kernels import make_runtime
    from flyweight.spaces.tracing import trace

    model, example = mobilenet()
    figures = {}
    figures["trace, the first"], _ = stopwatch(lambda: trace(model, example))
    figures["trace"], _ = stopwatch(lambda: trace(model, example))
    task = ClassificationTask(model, Noise(), Noise())
    runtime = make_runtime("onnxruntime", 1)
    figures["prepare"], prepared = stopwatch(lambda: prepare(task, runtime, Schedule()))
    figures["teacher's answers"], _ = stopwatch(lambda: prepared.search_answers)
    figures["importance (l1)"], _ = stopwatch(lambda: prepared.importance("pruned", "l1"))
    figures["moments"], _ = stopwatch(lambda: prepared.input_moments("pruned"))
    return figures


# -- memory --------------------------------------------------------------------------------------


def resident() -> dict[str, int]:
    """Bytes of this process that are resident, and the most that have been."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return {name: int(found[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")}


def growth(function: Callable[[], Any]) -> int:
    """Bytes by which ``function`` raises the peak of resident memory over what is in use."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc: the peak is understated
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident()["VmRSS"]
    function()
    return resident()["VmHWM"] - before


def tensor_peak(function: Callable[[], Any]) -> int:
    """The most bytes that torch's tensors made by ``function`` take at one time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    live = peak = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def memory(name: str) -> dict[str, int]:
    """Of the policy ``name``, in a process of its own."""
    from flyweight.compressors import compress

    prepared = fashion()
    policy = policies(prepared)[name]
    if policy.prune.width:
        prepared.importance("pruned", policy.prune.criterion)
        prepared.input_moments("pruned")
    assert len(prepared.search_answers)

    def once() -> None:
        compress(prepared, policy, RUNG)

    state = prepared.teacher.state_dict().values()
    items = prepared.splits.calibration.take(slice(0, BATCH))
    return {
        "model": sum(t.numel() * t.element_size() for t in state),
        "batch": items.inputs.numel() * items.inputs.element_size(),
        "activations": activations(prepared, items.inputs),
        "first": growth(once),
        "second": growth(once),
        "tensors": tensor_peak(once),
    }


def activations(prepared: Any, inputs: Any) -> int:
    """The most bytes of tensors when the teacher runs on one batch, without gradients."""
    import torch

    with torch.no_grad():
        prepared.teacher(inputs)
        return tensor_peak(lambda: prepared.teacher(inputs))


# -- the report ----------------------------------------------------------------------------------


def fresh(job: str, **arguments: Any) -> Any:
    """What the function ``job`` gives in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        given = json.dumps({"job": job, "arguments": arguments, "answer": str(answer)})
        command = [sys.executable, str(Path(__file__).resolve()), "--job", given]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
        if done.returncode:  # otherwise only torch's profiler says that it begins and ends
            raise SystemExit(done.stderr)
        return json.loads(answer.read_text())


def surgery(network: str, rounds: int) -> dict[str, list[float]]:
    return timed_surgery(rounds, {"resnet": resnet, "mobilenet": mobilenet}[network])


JOBS: dict[str, Callable[..., Any]] = {
    "compress": timed_compress, "surgery": surgery, "mobilenet": timed_mobilenet, "memory": memory,
}  # fmt: skip


def report_compress(found: dict[str, Any]) -> dict[str, Any]:
    print("\nOnce a process, seconds (CPU / wall):")
    for what, figures in found["once"].items():
        print(f"  {what:24}{figures['cpu_s']:7.3f} /{figures['wall_s']:7.3f}")
    print(f"\n{'compress, recalibrate':26}{'CPU s':>8}{'range':>14}{'wall s':>8}{'range':>14}")
    summary = {}
    for name, runs in found["runs"].items():
        row = {}
        line = f"{name:26}"
        for key in ("cpu_s", "wall_s"):
            values = [run[key] for run in runs]
            row[key] = statistics.median(values)
            line += f"{row[key]:8.3f}{f'{min(values):.3f}-{max(values):.3f}':>14}"
        names = dict.fromkeys(part for run in runs for part in run["parts"])
        parts = {p: statistics.median(r["parts"].get(p, 0.0) for r in runs) for p in names}
        summary[name] = {**row, "parts": parts}
        print(line)
    names = dict.fromkeys(p for row in summary.values() for p in row["parts"])
    print(f"\n{'parts, CPU ms (median)':26}" + "".join(f"{n:>26}" for n in summary))
    for part in names:
        cells = (row["parts"].get(part) for row in summary.values())
        print(f"{part:26}" + "".join(f"{'' if c is None else f'{c * 1e3:.1f}':>26}" for c in cells))
    worst = max(row["wall_s"] for row in summary.values())
    verdict = "kept" if worst <= LIMIT_S else "missed"
    print(f"At most {LIMIT_S} s on one core: {verdict} ({worst:.2f} s)")
    return {"summary": summary, "verdict": verdict}


def report_surgery(found: dict[str, dict[str, list[float]]]) -> None:
    print(f"\n{'surgery, CPU ms (median)':26}" + "".join(f"{name:>20}" for name in found))
    for what in next(iter(found.values())):
        cells = (statistics.median(seconds[what]) * 1e3 for seconds in found.values())
        print(f"{what:26}" + "".join(f"{cell:20.1f}" for cell in cells))


def report_memory(found: dict[str, dict[str, int]]) -> None:
    one = next(iter(found.values()))
    limit = LIMIT_MODELS * one["model"] + one["batch"]
    print(
        f"\nMemory, MB: the model {one['model'] / 1e6:.2f}, a batch of {BATCH} "
        f"{one['batch'] / 1e6:.2f} (the teacher's activations on it {one['activations'] / 1e6:.2f})"
        f"; {LIMIT_MODELS} models and a batch {limit / 1e6:.2f}"
    )
    print(f"{'':26}{'resident, first':>18}{'second':>10}{'tensors':>10}")
    for name, row in found.items():
        cells = "".join(f"{row[k] / 1e6:{w}.1f}" for k, w in (("first", 18), ("second", 10)))
        print(f"{name:26}{cells}{row['tensors'] / 1e6:10.1f}")
    most = max(row["second"] for row in found.values())
    print(f"At most that: {'kept' if most <= limit else f'missed ({most / limit:.1f} times)'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--skip-mobilenet", action="store_true")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        job = json.loads(options.job)
        result = JOBS[job["job"]](**job["arguments"])
        Path(job["answer"]).write_text(json.dumps(result))
        return
    here = machine()
    print(f"{here['name']}, {here['cores']} cores, load {here['load']}")
    numbers = versions((*LIBRARIES, "torch-pruning"))
    print(", ".join(f"{name} {number}" for name, number in numbers.items()))
    found: dict[str, Any] = {"rounds": options.rounds, "versions": numbers, "machine": here}
    found["compress"] = fresh("compress", rounds=options.rounds)
    found |= report_compress(found["compress"])
    networks = ("resnet",) if options.skip_mobilenet else ("resnet", "mobilenet")
    found["surgery"] = {n: fresh("surgery", network=n, rounds=options.rounds) for n in networks}
    report_surgery(found["surgery"])
    if not options.skip_memory:
        found["memory"] = {n: fresh("memory", name=n) for n in found["summary"]}
        report_memory(found["memory"])
    if not options.skip_mobilenet:
        found["mobilenet"] = fresh("mobilenet")
        print(f"\nMobileNetV2 at 224 x 224, {IMAGES} + {IMAGES} random images, s (CPU / wall):")
        for what, figures in found["mobilenet"].items():
            print(f"  {what:24}{figures['cpu_s']:7.2f} /{figures['wall_s']:7.2f}")
    print(f"Load at the end: {os.getloadavg()[0]:.2f}")
    print("Written:", write("compress", found))


if __name__ == "__main__":
    main()
