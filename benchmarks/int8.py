"""Where int8 pays: small networks of several kinds, all in fp32 and all in int8; what runs then.

    python benchmarks/int8.py [NETWORK ...] [--rounds 31] [--float add pool avgpool]

The weights are arbitrary (``untrained``): what runs does not hang on them. Latencies are measured
side by side, one thread, batch 1: interleaved rounds, minimum of a round, median over the rounds.
Where the int8 time goes is from ONNX Runtime's own profile, as shares: profiling makes every kernel
slower, so only the first two columns are times. --float: operations between layers that are left
to the runtime, which fuses a lone average in int8 all the same.
"""

import argparse
import dataclasses
import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import onnxruntime as ort
import torch
from common import write
from executed import INT8_KERNELS
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from flyweight.compressors import ClassificationTask, Schedule, prepare, untrained
from flyweight.kernels import make_runtime, time_sessions
from flyweight.spaces import Policy, Settings, Space

CALLS = 200  # profiled


def conv(
    read: int, made: int, size: int = 1, stride: int = 1, groups: int = 1, act: Any = nn.ReLU
) -> nn.Sequential:
    layer = nn.Conv2d(read, made, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(made), act() if act else nn.Identity())


class Excitation(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.less, self.more = nn.Conv2d(width, width // 4, 1), nn.Conv2d(width // 4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.relu(self.less(F.adaptive_avg_pool2d(x, 1)))
        return x * F.hardsigmoid(self.more(gate))


class Inverted(nn.Module):
    """MobileNetV3's block (Howard et al. 2019)."""

    def __init__(
        self, read: int, inner: int, made: int, size: int, stride: int, gate: bool, act: Any
    ) -> None:
        super().__init__()
        self.adds = stride == 1 and read == made
        self.body = nn.Sequential(
            conv(read, inner, act=act), conv(inner, inner, size, stride, inner, act),
            Excitation(inner) if gate else nn.Identity(), conv(inner, made, act=None),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.adds else self.body(x)


def mobilenet_v3(act: Any = nn.Hardswish, gate: bool = True) -> nn.Module:
    return nn.Sequential(
        conv(3, 16, 3, 2, act=act), Inverted(16, 32, 16, 3, 1, gate, nn.ReLU),
        Inverted(16, 64, 24, 3, 2, False, nn.ReLU), Inverted(24, 96, 24, 3, 1, False, nn.ReLU),
        Inverted(24, 96, 40, 5, 2, gate, act), Inverted(40, 160, 40, 5, 1, gate, act),
        Inverted(40, 160, 48, 5, 1, gate, act), conv(48, 192, act=act),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(192, 10),
    )  # fmt: skip


class ShuffleUnit(nn.Module):
    """ShuffleNetV2's (Ma et al. 2018)."""

    def __init__(self, read: int, made: int, stride: int) -> None:
        super().__init__()
        half, self.stride = made // 2, stride
        self.left = nn.Sequential(conv(read, read, 3, 2, read, None), conv(read, half))
        first = read if stride == 2 else half
        self.right = nn.Sequential(
            conv(first, half), conv(half, half, 3, stride, half, None), conv(half, half)
        )

    def forward(self, x: Tensor) -> Tensor:
        left, right = (self.left(x), x) if self.stride == 2 else x.chunk(2, 1)
        x = torch.cat([left, self.right(right)], 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def shufflenet_v2() -> nn.Module:
    return nn.Sequential(
        conv(3, 24, 3), nn.MaxPool2d(3, 2, 1), ShuffleUnit(24, 64, 2), ShuffleUnit(64, 64, 1),
        ShuffleUnit(64, 64, 1), ShuffleUnit(64, 128, 2), ShuffleUnit(128, 128, 1), conv(128, 192),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(192, 10),
    )  # fmt: skip


class NextBlock(nn.Module):
    """ConvNeXt's (Liu et al. 2022)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.across, self.norm = nn.Conv2d(width, width, 7, 1, 3, groups=width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.across(x).permute(0, 2, 3, 1))
        return x + self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 2, 2), NextBlock(32), nn.Conv2d(32, 64, 2, 2), NextBlock(64),
        NextBlock(64), nn.Conv2d(64, 96, 2, 2), NextBlock(96), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(96, 10),
    )  # fmt: skip


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(width, width, 3), conv(width, width, 3, act=None))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


def averages(size: int, residual: bool) -> nn.Module:
    """Three stages with averages of ``size`` x ``size`` between them."""
    layers: list[nn.Module] = []
    for read, made in ((3, 32), (32, 64), (64, 96)):
        layers += [conv(read, made, 3), Residual(made) if residual else conv(made, made, 3)]
        layers += [nn.AvgPool2d(size, 2, size // 2)]
    return nn.Sequential(*layers[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10))


class Recurrent(nn.Module):
    """Convolutions over time before a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(4, 64, 5, padding=2), nn.BatchNorm1d(64), nn.ReLU(),
            nn.Conv1d(64, 64, 5, 2, 2), nn.BatchNorm1d(64), nn.ReLU(),
        )  # fmt: skip
        self.gru, self.head = nn.GRU(64, 48, batch_first=True), nn.Linear(48, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.body(x).transpose(1, 2))[0][:, -1])


def one_dimension() -> nn.Module:
    layers: list[nn.Module] = []
    for read, made in ((4, 64), (64, 64), (64, 64)):
        layers += [nn.Conv1d(read, made, 5, padding=2), nn.BatchNorm1d(made), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, 6))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mobilenet_v3-28": (mobilenet_v3, (3, 28, 28)),
    "mobilenet_v3-112": (mobilenet_v3, (3, 112, 112)),
    "relu, no gates-28": (lambda: mobilenet_v3(nn.ReLU, False), (3, 28, 28)),
    "relu, no gates-112": (lambda: mobilenet_v3(nn.ReLU, False), (3, 112, 112)),
    "shufflenet_v2-28": (shufflenet_v2, (3, 28, 28)),
    "shufflenet_v2-112": (shufflenet_v2, (3, 112, 112)),
    "convnext-28": (convnext, (3, 28, 28)),
    "convnext-112": (convnext, (3, 112, 112)),
    "averages 2x2-32": (lambda: averages(2, False), (3, 32, 32)),
    "averages 3x3-32": (lambda: averages(3, False), (3, 32, 32)),
    "residual, averages 2x2-32": (lambda: averages(2, True), (3, 32, 32)),
    "conv1d-100": (one_dimension, (4, 100)),
    "conv1d-1000": (one_dimension, (4, 1000)),
    "conv1d+gru-100": (Recurrent, (4, 100)),
}


def artifacts(
    build: Callable[[], nn.Module], shape: tuple[int, ...], left: Sequence[str]
) -> dict[str, bytes]:
    """The network all in fp32 and all in int8 but what is ``left``, at full width."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(32, *shape), torch.arange(32) % 2)
    runtime: Any = make_runtime("onnxruntime", 1)
    known = runtime.capabilities
    runtime.capabilities = dataclasses.replace(known, int8_ops=known.int8_ops - {*left})
    prepared = prepare(ClassificationTask(build().eval(), data, data), runtime, Schedule())
    space = Space(prepared.network, runtime.capabilities, Settings())
    return {
        precision: untrained(prepared, Policy(quantize=space.uniform(1.0, precision).quantize))
        for precision in ("fp32", "int8")
    }


def kind(operation: str) -> str:
    """What an operation of ONNX Runtime is to us."""
    if operation in INT8_KERNELS:
        return "layers"
    if operation in ("QuantizeLinear", "DequantizeLinear"):
        return "conversions"
    if operation in ("Transpose", "Reshape", "ReorderInput", "ReorderOutput"):
        return "layout"
    return "others"


def profile(model: bytes, request: Any) -> tuple[dict[str, float], Counter[str]]:
    """Microseconds of each operation in one call, and how many nodes there are of each."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        for _ in range(CALLS):
            session.run(None, {"input": request})
        events = json.loads(Path(session.end_profiling()).read_text())
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        operation = event.get("args", {}).get("op_name")
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[operation, event["name"]].append(event["dur"])
    spent: dict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    for (operation, _), found in times.items():
        spent[operation] += median(found)
        counts[operation] += 1
    return dict(spent), counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--float", nargs="+", default=[], choices=("add", "pool", "avgpool"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    runtime, rows = make_runtime("onnxruntime", 1), {}
    for name in options.networks or NETWORKS:
        build, shape = NETWORKS[name]
        models = artifacts(build, shape, options.float)
        request = torch.randn(1, *shape).numpy()
        sessions = {precision: runtime.load(model) for precision, model in models.items()}
        timed = time_sessions(sessions, {"input": request}, rounds=options.rounds)
        fp32, int8 = (timed[precision].median_ms for precision in models)
        row: dict[str, Any] = {"fp32_ms": fp32, "int8_ms": int8, "speedup": fp32 / int8}
        for precision, model in models.items():
            spent, counts = profile(model, request)
            total = sum(spent.values())
            shares: Counter[str] = Counter()
            for operation, us in spent.items():
                shares[kind(operation)] += us / total
            row[precision] = {"us": spent, "nodes": counts, "shares": shares}
        rows[name] = row
        told = ", ".join(f"{what} {share:.0%}" for what, share in row["int8"]["shares"].items())
        print(f"{name}: {fp32:.4f} and {int8:.4f} ms, {fp32 / int8:.2f}x; int8: {told}")
        print("   ", dict(row["int8"]["nodes"]), flush=True)
    write("int8", {"rows": rows, "rounds": options.rounds, "float": options.float})


if __name__ == "__main__":
    main()
