"""What the peers share with each other and with flyweight: data, distillation, timing, accounts.

The budget is in CPU seconds, of the process and its children: on a machine with other work a
minute on the clock is worth less than one alone. Training is flyweight's own (``distill``: Hinton's
loss, one cycle of SGD, the task's augmentation, the teacher's answers kept), for as many epochs as
the budget of a limit allows.
"""

import argparse
import copy
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

from flyweight.compressors import Prepared, Schedule, load_task, prepare
from flyweight.compressors.data import Items
from flyweight.compressors.distill import Epoch, distill, kl_divergence
from flyweight.compressors.parity import run_session
from flyweight.compressors.prune import lay_out
from flyweight.kernels import make_runtime, time_sessions
from flyweight.spaces import Distill

HERE = Path(__file__).resolve().parent
ARTIFACTS = HERE / "artifacts"
EXAMPLE = HERE.parent.parent / "examples" / "fashion_mnist"

LIMITS = (2.5, 3.5, 4.5)  # times as fast as the teacher
BUDGET = 2 * 20 * 60.0  # CPU seconds for all limits: 20 minutes of two cores
MARGIN = 1.02  # over the limit, when measured before training: timings are off by a per cent or two
MOST_EPOCHS = 24  # as many as the teacher was trained for
# The middle of what the front of a search of an hour has (docs/benchmarks.md): peers get it free.
SETTINGS = Distill(temperature=4.5, alpha=0.8, learning_rate=0.03)
FEW = 64  # calibration items where only the speed is asked for
CHUNK = 64  # items whose every value ONNX Runtime's calibration holds in memory at once
TEACHER = "teacher"


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


class Spent(Exception):
    """The budget is used up."""


@dataclass
class Account:
    """What a limit may cost and has cost. carried: CPU seconds of what was taken over."""

    seconds: float
    began: float
    carried: float = 0.0

    @property
    def spent(self) -> float:
        return self.carried + cpu_seconds() - self.began

    @property
    def left(self) -> float:
        return self.seconds - self.spent


class Bench:
    """The task, prepared; the teacher's artifact, loaded. data: "full", or "embedded" for a try."""

    def __init__(self, data: str) -> None:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        torch.manual_seed(0)
        task = load_task("task.py:FashionMnist", EXAMPLE, {"data": data})
        self.prepared: Prepared = prepare(
            task, make_runtime("onnxruntime", 1), Schedule(full_epochs=3.0)
        )
        self.task = task
        self.teacher_model = export(self.teacher())
        self._session = self.prepared.runtime.load(self.teacher_model)
        self._request = {"input": self.prepared.example.numpy()}
        self._timed: dict[tuple[float, str], float] = {}

    def teacher(self) -> nn.Module:
        """A copy of it that can be pruned and trained, channels first."""
        model = copy.deepcopy(self.prepared.teacher).requires_grad_(True)
        lay_out(model, torch.contiguous_format)
        return model

    @property
    def calibration(self) -> Items:
        """512 training images."""
        return self.prepared.splits.calibration

    def speedup(self, model: bytes, rounds: int = 40) -> float:
        """Over the teacher in float, by the CPU time of the thread, so that other work on the
        machine disturbs little."""
        sessions = {TEACHER: self._session, "model": self.prepared.runtime.load(model)}
        found = time_sessions(sessions, self._request, rounds=rounds, clock=time.thread_time_ns)
        return found[TEACHER].min_ms / found["model"].min_ms

    def scores(self, model: bytes) -> dict[str, float]:
        """KL to the teacher on search validation, accuracy on both halves of validation."""
        session, splits = self.prepared.runtime.load(model), self.prepared.splits
        answers = run_session(session, splits.search)
        selection = run_session(session, splits.selection)
        return {
            "loss": kl_divergence(answers, self.prepared.search_answers).item(),
            "metric_search": self.task.metric(answers, splits.search.targets),
            "metric_selection": self.task.metric(selection, splits.selection.targets),
        }

    def distil(self, student: nn.Module, account: Account, reserve: float) -> float:
        """Trains ``student`` in place for what is left of the budget less ``reserve``; returns the
        epochs."""
        for variant in range(self.prepared.variants):
            self.prepared.epoch(variant)
        lay_out(student, torch.channels_last)
        each = self._epoch_seconds(student)
        epochs = max(1.0, min(MOST_EPOCHS, (account.left - reserve) / each))
        print(f"  {each:.1f} CPU s an epoch: {epochs:.1f} epochs", flush=True)

        def epoch(number: int) -> Epoch:
            print(f"  epoch {number}, {account.left:.0f} CPU s left", flush=True)
            if account.left <= 0:
                raise Spent
            return self.prepared.epoch(number)

        try:
            distill(
                student, epoch, epochs, SETTINGS, self.task.loss,
                peak=SETTINGS.learning_rate, batch=self.prepared.schedule.batch, seed=0,
            )  # fmt: skip
        except Spent:
            print("  the budget ended the training", flush=True)
        student.eval()
        lay_out(student, torch.contiguous_format)
        return epochs

    def _epoch_seconds(self, student: nn.Module) -> float:
        """CPU seconds of an epoch: what a tenth of one takes longer than a fortieth."""
        tried, (less, more), marks = copy.deepcopy(student), (1 / 40, 1 / 10), []
        for share in (less, less, more):  # the first call also sets up its kernels
            marks.append(cpu_seconds())
            distill(
                tried, self.prepared.epoch, share, SETTINGS, self.task.loss,
                peak=1e-3, batch=self.prepared.schedule.batch, seed=0,
            )  # fmt: skip
        marks.append(cpu_seconds())
        return max(1e-3, (marks[3] - 2 * marks[2] + marks[1]) / (more - less))

    def widest(
        self, sizes: Sequence[float], network: Callable[[float], nn.Module], limit: float
    ) -> tuple[float, str]:
        """The first of ``sizes``, largest first, whose untrained ``network`` keeps the limit, in
        int8 or, where that is slower, in float (narrow int8 convolutions are); if none does, the
        fastest. Size and precision."""
        for size in sizes:
            if (size, "fp32") not in self._timed:
                fp32 = export(network(size))
                for precision, model in (("int8", quick_int8(self, fp32)), ("fp32", fp32)):
                    self._timed[size, precision] = self.speedup(model)
                    found = f"{size:g}, {precision}: {self._timed[size, precision]:.2f} times"
                    print(f"  {found} as fast", flush=True)
            for precision in ("int8", "fp32"):
                if self._timed[size, precision] >= MARGIN * limit:
                    return size, precision
        return max(self._timed, key=self._timed.__getitem__)

    def artifact(self, student: nn.Module, precision: str) -> tuple[bytes, str]:
        """The trained ``student``, with the calibration that is nearest to the teacher on search
        validation ("" in float)."""
        fp32 = export(student)
        if precision == "fp32":
            return fp32, ""
        made = {how: onnxruntime_int8(self, fp32, self.calibration, how) for how in CALIBRATIONS}
        best = min(made, key=lambda how: self.scores(made[how])["loss"])
        return made[best], best


def export(module: nn.Module) -> bytes:
    """``module`` by torch.onnx, with a dynamic batch axis."""
    program = torch.onnx.export(
        copy.deepcopy(module).eval(), (torch.zeros(2, 1, 28, 28),), dynamo=True, verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["input"], output_names=["output"],
    )  # fmt: skip
    assert program is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        program.save(path, external_data=False)
        return path.read_bytes()


def widths(student: nn.Module) -> dict[str, int]:
    """The channels of every convolution."""
    convolutions = ((n, m) for n, m in student.named_modules() if isinstance(m, nn.Conv2d))
    return {name: module.out_channels for name, module in convolutions}


class Reader(CalibrationDataReader):
    """Calibration items one after the other, as ONNX Runtime's quantizer wants them."""

    def __init__(self, items: Items) -> None:
        self.items = items
        self.set_range(0, len(items))

    def __len__(self) -> int:
        return len(self.items)

    def set_range(self, start_index: int, end_index: int) -> None:
        some = self.items.take(torch.arange(start_index, end_index))
        self.rest: Iterator[Items] = some.batches(1)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.rest, None)
        return None if batch is None else {"input": batch.inputs.numpy()}


CALIBRATIONS = {
    "minmax": CalibrationMethod.MinMax,
    "percentile": CalibrationMethod.Percentile,
    "entropy": CalibrationMethod.Entropy,
}


def onnxruntime_int8(bench: Bench, fp32: bytes, items: Items, calibration: str) -> bytes:
    """Static int8 as ONNX Runtime's documentation says for x86: unsigned activations, signed
    weights a channel, held to 7 bits where the processor's kernels saturate."""
    with tempfile.TemporaryDirectory() as folder:
        source, ready, made = (Path(folder, n) for n in ("fp32", "ready", "int8"))
        source.write_bytes(fp32)
        quant_pre_process(str(source), str(ready))
        quantize_static(
            str(ready), str(made), Reader(items),
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, per_channel=True,
            reduce_range=bench.prepared.runtime.capabilities.weight_bits < 8,
            calibrate_method=CALIBRATIONS[calibration],
            extra_options={"CalibStridedMinMax": CHUNK},  # of all methods, whatever its name says
        )  # fmt: skip
        return made.read_bytes()


def quick_int8(bench: Bench, fp32: bytes) -> bytes:
    """The same where only its speed is asked for."""
    return onnxruntime_int8(bench, fp32, bench.calibration.first(FEW), "minmax")


@dataclass(frozen=True)
class Order:
    """One artifact to be built. student: where ``hand`` keeps its student for this limit, in
    float, which others begin with."""

    bench: Bench
    limit: float
    account: Account
    student: Path


Build = Callable[[Order], tuple[bytes, dict[str, Any]]]  # the artifact, and how it came about


def main(peer: str, build: Build, inherits: bool = False) -> None:
    """Builds the artifacts of ``peer`` limit by limit, those that are not there yet. inherits: it
    goes on from what ``hand`` made, and carries what that cost."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=ARTIFACTS)
    parser.add_argument("--limits", type=float, nargs="+", default=list(LIMITS))
    parser.add_argument("--budget", type=float, default=BUDGET, help="CPU seconds for all limits")
    parser.add_argument("--data", choices=("full", "embedded"), default="full")
    args = parser.parse_args()
    folder = args.out / peer
    folder.mkdir(parents=True, exist_ok=True)
    began, bench = cpu_seconds(), None
    for limit in args.limits:
        path = folder / f"{limit:g}.json"
        if path.exists():
            continue
        bench = bench or Bench(args.data)
        student = args.out / "hand" / f"{limit:g}.student.onnx"
        carried = cost(student) if inherits and limit > 1 else 0.0
        account = Account(args.budget / len(args.limits), began, carried)
        print(f"{peer}, {limit:g} times as fast", flush=True)
        model, how = build(Order(bench, limit, account, student))
        onnx.checker.check_model(onnx.load_from_string(model))
        figures = {
            "limit": limit, "cpu_seconds": round(account.spent, 1), "budget": account.seconds,
            "speedup": round(bench.speedup(model), 3), "size_bytes": len(model),
            **bench.scores(model), **how,
        }  # fmt: skip
        path.with_suffix(".onnx").write_bytes(model)
        path.write_text(json.dumps(figures, indent=1) + "\n")
        print(json.dumps(figures), flush=True)
        began = cpu_seconds()


def cost(student: Path) -> float:
    """The CPU seconds that the student of ``hand`` and its artifact cost."""
    path = student.with_name(student.name.replace(".student.onnx", ".json"))
    if not (path.exists() and student.exists()):
        raise SystemExit(f"{student} is not there: python benchmarks/peers/run.py hand comes first")
    return float(json.loads(path.read_text())["cpu_seconds"])
