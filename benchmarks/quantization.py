"""Post-training int8 of flyweight beside ONNX Runtime's own static quantizer, on equal data.

    python benchmarks/quantization.py resnet [mobilenet_v2] [--draws 5] [--calibrations minmax ...]

All layers are int8. Each draw takes other calibration items; flyweight's calibration is the one
with the least KL on search validation. Lost are points of the metric on the test set: accuracy of
the ResNet on the official Fashion-MNIST images, agreement with the teacher of the others. The
interval is a paired bootstrap over test items of (ours - theirs), in points, all draws together.
Writes benchmarks/out/quantization-NETWORK.json.
"""

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from flyweight.compressors import Prepared, Schedule, compress, load_task, prepare
from flyweight.compressors.data import CALIBRATION, Items
from flyweight.compressors.export import to_onnx
from flyweight.compressors.freeze import freeze
from flyweight.compressors.parity import run_session
from flyweight.compressors.quantize import fold_norms
from flyweight.kernels import float_layers, int8_layers, make_runtime, time_sessions
from flyweight.spaces import Policy, Quantize
from flyweight.spaces.tracing import trace_graph

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet": ("fashion_mnist/task.py:FashionMnist", {}),
    "mobilenet_v2": ("imagenet/task.py:ImageNet", {"network": "mobilenet_v2"}),
}
OURS = ("minmax", "percentile", "mse", "fitted")
THEIRS: dict[str, dict[str, bool]] = {
    "onnxruntime, defaults": {},
    "onnxruntime, 7 bits per channel": {"per_channel": True, "reduce_range": True},
}


class Reader(CalibrationDataReader):
    """Calibration items one after the other, as ONNX Runtime's quantizer wants them."""

    def __init__(self, items: Items) -> None:
        self.rest = iter(items.batches(1))

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.rest, None)
        return None if batch is None else {"input": batch.inputs.numpy()}


def their_int8(fp32: bytes, items: Items, settings: dict[str, bool]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        source, ready, made = (Path(folder, n) for n in ("fp32", "ready", "int8"))
        source.write_bytes(fp32)
        quant_pre_process(str(source), str(ready))
        quantize_static(
            str(ready), str(made), Reader(items), quant_format=QuantFormat.QDQ, **settings
        )
        return made.read_bytes()


def our_int8(prepared: Prepared, calibrations: list[str]) -> tuple[bytes, str]:
    """The artifact whose calibration has the least KL to the teacher on search validation."""
    precision = dict.fromkeys(prepared.network.layers, "int8")
    made = [
        compress(prepared, Policy(quantize=Quantize(precision, how)), "recalibrate")
        for how in calibrations
    ]
    best = min(made, key=lambda candidate: candidate.loss)
    return best.model, best.policy.quantize.calibration


def interval(ours: np.ndarray, theirs: np.ndarray) -> list[float]:
    """95% of the mean difference [points], over resampled items; both [draws, items]."""
    difference = 100 * (ours.astype(float) - theirs).mean(0)
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(difference), (2_000, len(difference)))
    return [round(v, 3) for v in np.quantile(difference[picks].mean(1), [0.025, 0.975])]


def measure(name: str, draws: int, calibrations: list[str]) -> dict[str, Any]:
    reference, arguments = NETWORKS[name]
    file, _, kind = reference.rpartition(":")
    task = load_task(f"{Path(file).name}:{kind}", (EXAMPLES / file).parent, arguments)
    runtime = make_runtime("onnxruntime", 1)
    prepared = prepare(task, runtime, Schedule())
    test = prepared.splits.test
    assert test is not None
    folded = fold_norms(trace_graph(prepared.teacher, prepared.example), prepared.network)
    fp32 = to_onnx(freeze(folded), prepared.example)

    def right(model: bytes) -> np.ndarray:
        answers = run_session(runtime.load(model), test)
        return (answers.argmax(1) == test.targets).numpy()

    teacher = right(fp32)
    hits: dict[str, list[np.ndarray]] = {}
    models: dict[str, bytes] = {"teacher": fp32}
    chosen: list[str] = []
    seconds: dict[str, list[float]] = {}
    for draw in range(draws):
        train = prepared.splits.train
        generator = torch.Generator().manual_seed(draw)
        some = train.take(torch.randperm(len(train), generator=generator)[:CALIBRATION])
        drawn = dataclasses.replace(
            prepared, splits=dataclasses.replace(prepared.splits, calibration=some)
        )
        makers: dict[str, Callable[[], bytes]] = {
            "flyweight": lambda d=drawn: keep(our_int8(d, calibrations), chosen),
            **{n: lambda s=s, i=some: their_int8(fp32, i, s) for n, s in THEIRS.items()},
        }
        for method, make in makers.items():
            began = time.process_time()
            models[method] = make()
            seconds.setdefault(method, []).append(time.process_time() - began)
            hits.setdefault(method, []).append(right(models[method]))
            lost = 100 * (teacher.mean() - hits[method][-1].mean())
            print(f"{name}, draw {draw}, {method}: {lost:.2f} lost", flush=True)
    sessions = {n: runtime.load(m) for n, m in models.items()}
    times = time_sessions(sessions, {"input": prepared.example.numpy()})
    rows = {
        method: {
            "lost": [round(100 * float(teacher.mean() - h.mean()), 3) for h in of],
            "mean_lost": round(100 * float(teacher.mean() - np.mean(of)), 3),
            "ours_minus_this": interval(np.array(hits["flyweight"]), np.array(of)),
            "speedup": round(times["teacher"].median_ms / times[method].median_ms, 3),
            "kernels": [int8_layers(models[method]), float_layers(models[method])],
            "cpu_s": round(float(np.mean(seconds[method])), 2),
        }
        for method, of in hits.items()
    }
    return {
        "network": name, "items": len(test), "metric": 100 * float(teacher.mean()),
        "teacher_ms": round(times["teacher"].median_ms, 3), "chosen": chosen, "rows": rows,
        "spread": {n: round(t.spread, 3) for n, t in times.items()},
        "waiting": {n: round(t.waiting, 3) for n, t in times.items()},
    }  # fmt: skip


def keep(made: tuple[bytes, str], chosen: list[str]) -> bytes:
    chosen.append(made[1])
    return made[0]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("networks", nargs="+", choices=NETWORKS)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--calibrations", nargs="+", choices=OURS, default=list(OURS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.networks:
        found = measure(name, given.draws, given.calibrations)
        print(f"{name}: {found['metric']:.2f} on {found['items']} items; chosen {found['chosen']}")
        for method, row in found["rows"].items():
            print(
                f"  {method:34s} {row['mean_lost']:6.2f} lost, ours - this {row['ours_minus_this']}"
                f", {row['speedup']:.2f}x, int8/float layers {row['kernels']}, {row['cpu_s']} s"
            )
        print(f"  written to {write(f'quantization-{name}', found)}")


if __name__ == "__main__":
    sys.exit(main())
