"""Does the runtime compute what the student computes? On real inputs, every example network.

    python benchmarks/parity.py [resnet vit har article_cnn minilm] [--inputs 2000]
        [--calibration fitted]

Float and int8 (calibration mse where nothing is said), all channels and pruned uniformly, at the
recalibrate rung: nothing is trained. Inputs are of validation and, where they are too few, of the
test set. Agreement of predictions is to be 99.9% in float and 99.5% in int8. Beside it, for int8,
the same student against itself with every float in it off by one unit in the last place or so (1e-7
of itself): rounding flips grow through depth, and a runtime that adds in another order cannot be
expected to agree better than that. Writes benchmarks/out/parity.json after every row.
"""

import argparse
import copy
import dataclasses
import json
from typing import Any

import torch
from common import OUT, write
from executed import float_layers, int8_layers
from networks import NETWORKS, joined, twin
from torch import fx

from flyweight.compressors import Schedule, compress, prepare
from flyweight.compressors.observe import ACTIVATION_RANGES
from flyweight.compressors.parity import AGREEMENT, INPUTS, compare, run_module, run_session
from flyweight.kernels import make_runtime
from flyweight.spaces import Settings, Space

ULP = 1e-7  # of single precision, as a share


def nudged(frozen: fx.GraphModule) -> fx.GraphModule:
    """A copy in which every float is off by about one unit in the last place."""
    other = copy.deepcopy(frozen)
    generator = torch.Generator().manual_seed(0)
    for tensor in (*other.parameters(), *other.buffers()):
        if tensor.is_floating_point():
            tensor.mul_(1 + ULP * torch.randn(tensor.shape, generator=generator))
    return other


def measure(
    name: str, count: int, keeps: tuple[float, ...], how: str, done: dict[str, Any]
) -> None:
    runtime = make_runtime("onnxruntime", 1)
    ready = prepare(NETWORKS[name](), runtime, Schedule())
    splits = ready.splits
    pool = joined([part for part in (splits.selection, splits.search, splits.test) if part])
    items = pool.first(count)
    space = Space(ready.network, runtime.capabilities, Settings(min_keep=0.25))
    for keep in keeps:
        for precision in ("fp32", "int8"):
            key = f"{name}, {precision}, {keep:g}"
            if precision == "int8" and how != "mse":
                key += f", {how}"
            if key in done:
                continue
            policy = space.uniform(keep, precision)
            if precision == "int8":
                chosen = dataclasses.replace(policy.quantize, calibration=how)
                policy = dataclasses.replace(policy, quantize=chosen)
            found = compress(ready, policy, "recalibrate")
            frozen = twin(ready, found)
            student = run_module(frozen, items)
            seen = compare(student, run_session(runtime.load(found.model), items))
            row = {**dataclasses.asdict(seen), "least": AGREEMENT[precision]}
            row["kernels"] = [int8_layers(found.model), float_layers(found.model)]
            if precision == "int8":
                row["itself"] = compare(student, run_module(nudged(frozen), items)).agreement
            done[key] = row
            print(key, row, flush=True)
            write("parity", {"rows": done})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--inputs", type=int, default=INPUTS)
    parser.add_argument("--keeps", type=float, nargs="+", default=(1.0, 0.75, 0.5))
    parser.add_argument("--calibration", default="mse", choices=list(ACTIVATION_RANGES))
    given = parser.parse_args()
    torch.set_num_threads(1)
    path = OUT / "parity.json"
    done: dict[str, Any] = json.loads(path.read_text())["rows"] if path.exists() else {}
    for name in given.networks:
        measure(name, given.inputs, tuple(given.keeps), given.calibration, done)


if __name__ == "__main__":
    main()
