"""Post-training int8 of flyweight beside ONNX Runtime's quantizer and NNCF's, on equal data.

    pip install -c constraints.txt -e '.[dev,benchmarks]'
    python benchmarks/quantization.py resnet [vit har article_cnn minilm mobilenet_v2
        efficientnet_lite0] [--draws 5] [--ours minmax ...] [--theirs minmax ...]
        [--tools nncf ...]

All layers are int8; where the example has a policy in mixed precision (imagenet/NETWORK.json), that
too. Each draw takes other calibration items, the same for everybody. Where a tool has several
calibrations, the one with the least KL to the teacher on search validation counts.

Lost are points of the metric on the test set: agreement with the teacher of the networks of
imagenet, accuracy of the others. The interval is a paired bootstrap over test items
of (ours - theirs), in points, all draws together; ours is the mixed policy where there is one.
Writes benchmarks/out/quantization-NETWORK.json.
"""

import argparse
import dataclasses
import functools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import onnx
import torch
from common import versions, write
from executed import float_layers, int8_layers
from networks import EXAMPLES, NETWORKS, joined, twin
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from flyweight.compressors import Candidate, Prepared, Schedule, compress, prepare
from flyweight.compressors.data import CALIBRATION, Items
from flyweight.compressors.distill import kl_divergence
from flyweight.compressors.export import to_onnx
from flyweight.compressors.freeze import freeze
from flyweight.compressors.parity import INPUTS, compare, feed, run_module, run_session
from flyweight.compressors.quantize import fold_norms
from flyweight.kernels import make_runtime, time_sessions
from flyweight.spaces import Policy, Quantize
from flyweight.spaces.tracing import trace_graph

OURS = ("minmax", "percentile", "mse", "fitted")
THEIRS = {
    "minmax": CalibrationMethod.MinMax,
    "percentile": CalibrationMethod.Percentile,
    "entropy": CalibrationMethod.Entropy,
}
OURSELVES = ("flyweight", "flyweight, mixed")
TRANSFORMER = "nncf, transformer"  # NNCF told that it is one
TOOLS = ("onnxruntime, defaults", "onnxruntime", "nncf", TRANSFORMER)  # of others
TRANSFORMERS = ("vit", "minilm")
CHUNK = 64  # items whose every value ONNX Runtime's calibration holds in memory at once


class Reader(CalibrationDataReader):
    """Calibration items one after the other, as ONNX Runtime's quantizer wants them."""

    def __init__(self, items: Items) -> None:
        self.items = items
        self.set_range(0, len(items))

    def __len__(self) -> int:
        return len(self.items)

    def set_range(self, start_index: int, end_index: int) -> None:
        self.rest: Iterator[Items] = self.items.take(torch.arange(start_index, end_index)).batches(
            1
        )

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.rest, None)
        return None if batch is None else feed(batch.inputs)


def onnxruntime_int8(fp32: bytes, items: Items, settings: dict[str, Any]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        source, ready, made = (Path(folder, n) for n in ("fp32", "ready", "int8"))
        source.write_bytes(fp32)
        quant_pre_process(str(source), str(ready))
        stride = {"CalibStridedMinMax": CHUNK}  # of all methods, whatever its name says
        quantize_static(str(ready), str(made), Reader(items), extra_options=stride, **settings)
        return made.read_bytes()


def onnxruntime_settings(calibration: str, weight_bits: int) -> dict[str, Any]:
    """What ONNX Runtime's documentation says for x86 CPUs.

    Its defaults are for GPUs: signed activations. Turned into unsigned ones when a file is loaded,
    they stay signed where a value has two readers, as at a residual, and a convolution whose input
    and output differ in type runs in float: 9 of the 15 of the ResNet.
    """
    return {
        "activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True,
        "reduce_range": weight_bits < 8, "calibrate_method": THEIRS[calibration],
    }  # fmt: skip


def nncf_int8(fp32: bytes, items: Items, model_type: nncf.ModelType | None = None) -> bytes:
    data = nncf.Dataset([feed(batch.inputs) for batch in items.batches(1)])
    model = onnx.load_from_string(fp32)
    made = nncf.quantize(model, data, subset_size=len(items), model_type=model_type)
    return made.SerializeToString()


def best_onnxruntime(
    prepared: Prepared, fp32: bytes, items: Items, calibrations: list[str]
) -> tuple[bytes, str]:
    """The artifact, and the calibration that made it."""
    bits = prepared.runtime.capabilities.weight_bits
    made = [
        (onnxruntime_int8(fp32, items, onnxruntime_settings(how, bits)), how)
        for how in calibrations
    ]
    return made[0] if len(made) == 1 else min(made, key=lambda one: _kl(prepared, one[0]))


def _kl(prepared: Prepared, model: bytes) -> float:
    answers = run_session(prepared.runtime.load(model), prepared.splits.search)
    return kl_divergence(answers, prepared.search_answers).item()


def _model(prepared: Prepared, policy: Policy) -> bytes:
    return compress(prepared, policy, "recalibrate").model


def best_flyweight(prepared: Prepared, calibrations: list[str]) -> Candidate:
    precision = dict.fromkeys(prepared.network.layers, "int8")
    made = [
        compress(prepared, Policy(quantize=Quantize(precision, how)), "recalibrate")
        for how in calibrations
    ]
    return min(made, key=lambda candidate: candidate.loss)


def mixed_policy(name: str) -> Policy | None:
    """The example's own policy for the network ``name``, None if it has none."""
    path = EXAMPLES / "imagenet" / f"{name}.json"
    return Policy.from_json(path.read_text()) if path.exists() else None


def parity(prepared: Prepared, student: torch.nn.Module, model: bytes) -> dict[str, float]:
    """Of an artifact with its student, on validation."""
    splits = prepared.splits
    some = joined([splits.search, splits.selection]).first(INPUTS)
    answers = run_session(prepared.runtime.load(model), some)
    return dataclasses.asdict(compare(run_module(student, some), answers))


def interval(ours: np.ndarray, theirs: np.ndarray) -> list[float]:
    """95% of the mean difference [points], over resampled items; both [draws, items]."""
    difference = 100 * (ours.astype(float) - theirs).mean(0)
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(difference), (2_000, len(difference)))
    return [round(float(v), 3) for v in np.quantile(difference[picks].mean(1), [0.025, 0.975])]


def measure(
    name: str, draws: int, ours: list[str], theirs: list[str], tools: list[str]
) -> dict[str, Any]:
    task = NETWORKS[name]()
    runtime = make_runtime("onnxruntime", 1)
    prepared = prepare(task, runtime, Schedule())
    test, mixed = prepared.splits.test, mixed_policy(name)
    assert test is not None
    parts: dict[str, int] = getattr(task, "parts", {"test": len(test)})
    ends = np.cumsum(list(parts.values()))
    folded = freeze(fold_norms(trace_graph(prepared.teacher, prepared.example), prepared.network))
    fp32 = to_onnx(folded, prepared.example)

    def right(model: bytes) -> np.ndarray:
        answers = run_session(runtime.load(model), test)
        return (answers.argmax(1) == test.targets).numpy()

    teacher = right(fp32)
    hits: dict[str, list[np.ndarray]] = {}
    models: dict[str, bytes] = {"teacher": fp32}
    chosen: dict[str, list[str]] = {"flyweight": [], "onnxruntime": []}
    same = {"fp32": parity(prepared, folded, fp32)}
    seconds: dict[str, list[float]] = {}
    for draw in range(draws):
        train = prepared.splits.train
        generator = torch.Generator().manual_seed(draw)
        some = train.take(torch.randperm(len(train), generator=generator)[:CALIBRATION])
        drawn = dataclasses.replace(
            prepared, splits=dataclasses.replace(prepared.splits, calibration=some)
        )

        def flyweight(drawn: Prepared = drawn) -> bytes:
            best = best_flyweight(drawn, ours)
            chosen["flyweight"].append(best.policy.quantize.calibration)
            if "int8" not in same:
                same["int8"] = parity(prepared, twin(drawn, best), best.model)
            return best.model

        def onnxruntime(some: Items = some) -> bytes:
            made, how = best_onnxruntime(prepared, fp32, some, theirs)
            chosen["onnxruntime"].append(how)
            return made

        makers: dict[str, Callable[[], bytes]] = {
            "flyweight": flyweight,
            "onnxruntime, defaults": functools.partial(onnxruntime_int8, fp32, some, {}),
            "onnxruntime": onnxruntime,
            "nncf": functools.partial(nncf_int8, fp32, some),
        }
        if name in TRANSFORMERS:
            kind = nncf.ModelType.TRANSFORMER
            makers[TRANSFORMER] = functools.partial(nncf_int8, fp32, some, kind)
        if mixed is not None:
            makers["flyweight, mixed"] = functools.partial(_model, drawn, mixed)
        for method, make in makers.items():
            if method not in OURSELVES and method not in tools:
                continue
            began = time.process_time()
            models[method] = make()
            seconds.setdefault(method, []).append(time.process_time() - began)
            hits.setdefault(method, []).append(right(models[method]))
            lost = 100 * (teacher.mean() - hits[method][-1].mean())
            print(f"{name}, draw {draw}, {method}: {lost:.2f} lost", flush=True)
    ours_is = "flyweight" if mixed is None else "flyweight, mixed"
    sessions = {n: runtime.load(m) for n, m in models.items()}
    times = time_sessions(sessions, feed(prepared.example))
    rows = {
        method: {
            "lost": [round(100 * float(teacher.mean() - h.mean()), 3) for h in of],
            "mean_lost": round(100 * float(teacher.mean() - np.mean(of)), 3),
            "metric": {  # of each set of test items
                part: round(100 * float(np.mean([h[end - count : end] for h in of])), 2)
                for (part, count), end in zip(parts.items(), ends, strict=True)
            },
            "ours_minus_this": interval(np.array(hits[ours_is]), np.array(of)),
            "speedup": round(times["teacher"].median_ms / times[method].median_ms, 3),
            "kernels": [int8_layers(models[method]), float_layers(models[method])],
            "cpu_s": round(float(np.mean(seconds[method])), 2),
        }
        for method, of in hits.items()
    }
    return {
        "network": name, "items": len(test), "metric": 100 * float(teacher.mean()),
        "weight_bits": runtime.capabilities.weight_bits, "calibrations": [ours, theirs],
        "parts": parts,
        "teacher_ms": round(times["teacher"].median_ms, 3), "chosen": chosen, "rows": rows,
        "parity": same,
        "spread": {n: round(t.spread, 3) for n, t in times.items()},
        "waiting": {n: round(t.waiting, 3) for n, t in times.items()},
        "tools": versions(("nncf", "onnx")),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("networks", nargs="+", choices=NETWORKS)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--ours", nargs="+", choices=OURS, default=list(OURS))
    parser.add_argument("--theirs", nargs="+", choices=THEIRS, default=list(THEIRS))
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.networks:
        found = measure(name, given.draws, given.ours, given.theirs, given.tools)
        print(f"{name}: {found['metric']:.2f} on {found['items']} items; chosen {found['chosen']}")
        for method, row in found["rows"].items():
            print(
                f"  {method:22s} {row['mean_lost']:6.2f} lost {row['metric']}"
                f", ours - this {row['ours_minus_this']}"
                f", {row['speedup']:.2f}x, int8/float layers {row['kernels']}, {row['cpu_s']} s"
            )
        for precision, of in found["parity"].items():
            print(
                f"  parity of ours in {precision}: {of['agreement']:.2%} of {of['inputs']} agree, "
                f"{of['mean_steps']:.2f} steps apart on average"
            )
        print(f"  written to {write(f'quantization-{name}', found)}")


if __name__ == "__main__":
    sys.exit(main())
