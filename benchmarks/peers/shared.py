"""What the peers share with each other and with flyweight: data, distillation, timing, accounts.

The budget is in CPU seconds, of the process and its children: on a machine with other work a
minute on the clock is worth less than one alone. What comes before any choice (data, trace, the
teacher's artifact) is not counted, as in a search. Training is flyweight's own (``distill``:
Hinton's loss, one cycle of SGD, the task's augmentation, the teacher's answers kept, in bfloat16
where a search would train so). A limit may cost its equal share of what is left of the budget: what
one does not need, those after it have.
"""

import argparse
import copy
import json
import os
import resource
import statistics
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
from run import LIMITS
from torch import nn

from flyweight.compressors import Prepared, Schedule, load_task, prepare
from flyweight.compressors.bfloat16 import in_bfloat16
from flyweight.compressors.data import Items
from flyweight.compressors.distill import Diverged, Epoch, distill, kl_divergence
from flyweight.compressors.parity import run_session
from flyweight.compressors.prune import lay_out, recompute_statistics
from flyweight.kernels import make_runtime, time_sessions
from flyweight.spaces import Distill, Impossible

HERE = Path(__file__).resolve().parent
ARTIFACTS = HERE / "artifacts"
EXAMPLE = HERE.parent.parent / "examples" / "fashion_mnist"

BUDGET = 2 * 20 * 60.0  # CPU seconds for all limits: 20 minutes of two cores
MARGIN = 1.02  # over the limit, when measured before training: timings are off by a per cent or two
CLOSE = 0.03  # of what is asked for: a speed-up this near to it is measured again
MOST_EPOCHS = 24.0  # as many as the teacher was trained for
# Peers get these free: the seven that a search of an hour finished (docs/benchmarks.md) have
# temperatures of 3.9 to 6.3, alphas of 0.61 to 0.92 and rates of 0.007 to 0.019, median 0.017.
TEMPERATURE, ALPHA = 4.5, 0.8
RATES = (0.02, 0.04, 0.01)  # tried in this order, as many as the budget allows
RESERVE = 30.0  # CPU seconds for what comes after a training
OVER = 0.1  # of its budget, that a training may take more before it is cut off, its rate not yet 0
FEW = 64  # calibration items where only the speed is asked for
CHUNK = 64  # items whose every value ONNX Runtime's calibration holds in memory at once
TEACHER = "teacher"


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


class Spent(Exception):
    """The budget is used up, with so many epochs done."""


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


@dataclass(frozen=True)
class Made:
    """An artifact. fp32: the same before quantization; loss: KL to the teacher on search
    validation; how: what it came from."""

    model: bytes
    fp32: bytes
    loss: float
    how: dict[str, Any]


class Bench:
    """The task, prepared; the teacher's artifact, loaded. data: "full", or "embedded" for a try;
    seed: of the distillation."""

    def __init__(self, data: str, seed: int) -> None:
        self.seed = seed
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        torch.manual_seed(0)
        task = load_task("task.py:FashionMnist", EXAMPLE, {"data": data})
        self.prepared: Prepared = prepare(
            task, make_runtime("onnxruntime", 1), Schedule(full_epochs=3.0)
        )
        self.task = task
        self.halves = bool(in_bfloat16(self.prepared, ["pruned"], gpus=False))
        self.teacher_model = export(self.teacher())
        self._session = self.prepared.runtime.load(self.teacher_model)
        self._request = {"input": self.prepared.example.numpy()}
        self._sized: dict[float, dict[str, bytes]] = {}
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

    def finish(self, student: nn.Module, precision: str, account: Account) -> Made:
        """The artifact that is nearest to the teacher: of ``student`` as it is, and trained at one
        rate after the other for as long as a whole training fits. What is not pruned is not
        trained: int8 alone is nearer to the teacher than training leaves it."""
        if widths(student) == widths(self.prepared.teacher):
            return self.artifact(student, precision)
        recompute_statistics(student, self.calibration)
        made = [self.artifact(student, precision)]
        for variant in range(self.prepared.variants):
            self.prepared.epoch(variant)  # the teacher's answers
        each = self._epoch_seconds(student)
        epochs = max(1.0, min(MOST_EPOCHS, (account.left - RESERVE) / each))
        print(f"  {each:.1f} CPU s an epoch: {epochs:.1f} epochs", flush=True)
        trainings = []
        for rate in RATES:
            before = account.left
            try:
                tried, done = self._trained(student, rate, epochs, account)
            except Diverged as error:
                print(f"  {error}", flush=True)
            else:
                made.append(self.artifact(tried, precision, learning_rate=rate))
                training = {"learning_rate": rate, "epochs": round(done, 1), "loss": made[-1].loss}
                trainings.append(training)
                print(f"  {training}, {account.left:.0f} CPU s left", flush=True)
            if account.left < before - account.left:
                break
        best = min(made, key=lambda one: one.loss)
        how = {**best.how, "untrained_loss": made[0].loss, "trainings": trainings}
        return Made(best.model, best.fp32, best.loss, how)

    def _trained(
        self, student: nn.Module, rate: float, epochs: float, account: Account
    ) -> tuple[nn.Module, float]:
        """A copy of ``student``, trained, and the epochs really done. Raises Diverged."""
        tried, done = lay_out(copy.deepcopy(student), torch.channels_last), epochs

        def epoch(number: int) -> Epoch:
            if account.left < -OVER * account.seconds:
                raise Spent(number)
            return self.prepared.epoch(number)

        try:
            self._distil(tried, epoch, epochs, rate)
        except Spent as error:
            done = float(error.args[0])
            print(f"  the budget ended the training after {done:.0f} epochs", flush=True)
        return lay_out(tried.eval(), torch.contiguous_format), done

    def _distil(
        self, student: nn.Module, epoch: Callable[[int], Epoch], epochs: float, rate: float
    ) -> None:
        settings = Distill(temperature=TEMPERATURE, alpha=ALPHA, learning_rate=rate)
        distill(
            student, epoch, epochs, settings, self.task.loss,
            peak=rate, batch=self.prepared.schedule.batch, seed=self.seed, halves=self.halves,
        )  # fmt: skip

    def _epoch_seconds(self, student: nn.Module) -> float:
        """CPU seconds of an epoch: its augmentation, and ten times a tenth of its steps. Medians
        of three."""
        tried = lay_out(copy.deepcopy(student), torch.channels_last)
        data, steps = [], []
        for turn in range(4):
            began = cpu_seconds()
            epoch = self.prepared.epoch(0)
            read = cpu_seconds()
            self._distil(tried, lambda _, epoch=epoch: epoch, 1 / 10, 1e-3)
            if turn:  # the first also sets up its kernels
                data.append(read - began)
                steps.append(cpu_seconds() - read)
        return max(1e-3, statistics.median(data) + 10 * statistics.median(steps))

    def widest(
        self, sizes: Sequence[float], network: Callable[[float], nn.Module], limit: float
    ) -> tuple[float, str]:
        """The largest of ``sizes``, largest first, whose untrained ``network`` keeps the limit, in
        int8 or, where that is slower, in float (narrow int8 convolutions are), by bisection; if
        none does, the fastest. A size that cannot be had (Impossible) is too small. Size and
        precision."""

        def kept(size: float) -> str | None:
            for precision in ("int8", "fp32"):
                if self._speed(size, precision, network, MARGIN * limit) >= MARGIN * limit:
                    return precision
            return None

        if found := kept(sizes[0]):
            return sizes[0], found
        slow, fast, chosen = 0, len(sizes), None
        while fast - slow > 1:
            middle = (slow + fast) // 2
            try:
                found = kept(sizes[middle])
            except Impossible as error:
                print(f"  {sizes[middle]:g}: {error}", flush=True)
                fast = middle
                continue
            if found:
                fast, chosen = middle, (sizes[middle], found)
            else:
                slow = middle
        return chosen or max(self._timed, key=self._timed.__getitem__)

    def _speed(
        self, size: float, precision: str, network: Callable[[float], nn.Module], asked: float
    ) -> float:
        """How many times as fast as the teacher; measured anew, for longer, near to ``asked``."""
        if size not in self._sized:
            fp32 = export(network(size))
            self._sized[size] = {"int8": quick_int8(self, fp32), "fp32": fp32}
        key, model = (size, precision), self._sized[size][precision]
        if key not in self._timed:
            self._timed[key] = self.speedup(model)
        if abs(self._timed[key] / asked - 1) < CLOSE:
            self._timed[key] = statistics.median(self.speedup(model, 100) for _ in range(3))
        print(f"  {size:g}, {precision}: {self._timed[key]:.2f} times as fast", flush=True)
        return self._timed[key]

    def artifact(
        self, student: nn.Module, precision: str, learning_rate: float | None = None
    ) -> Made:
        """``student`` as it is deployed, with the calibration that is nearest to the teacher on
        search validation ("" in float). learning_rate: that it was trained at."""
        fp32 = export(student)
        made = {"": fp32}
        if precision == "int8":
            made = {c: onnxruntime_int8(self, fp32, self.calibration, c) for c in CALIBRATIONS}
        losses = {name: self.scores(model)["loss"] for name, model in made.items()}
        best = min(losses, key=losses.__getitem__)
        how = {
            "precision": precision, "calibration": best, "learning_rate": learning_rate,
            "widths": widths(student),
        }  # fmt: skip
        return Made(made[best], fp32, losses[best], how)


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


def named(peer: str, seed: int) -> str:
    """The folder of a peer's artifacts."""
    return f"{peer}-{seed}" if seed else peer


def main(peer: str, build: Build, inherits: bool = False) -> None:
    """Builds the artifacts of ``peer`` limit by limit, those that are not there yet. inherits: it
    goes on from what ``hand`` made, and carries what that cost; nothing where that is the teacher.

    The least limit comes first: int8 alone keeps it, so that nearly all of the budget is left for
    the others.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=ARTIFACTS)
    parser.add_argument("--limits", type=float, nargs="+", default=list(LIMITS))
    parser.add_argument("--budget", type=float, default=BUDGET, help="CPU seconds for all limits")
    parser.add_argument("--data", choices=("full", "embedded"), default="full")
    parser.add_argument("--seed", type=int, default=0, help="of the distillation")
    args = parser.parse_args()
    limits = sorted(args.limits)
    asked = {"data": args.data, "budget": args.budget, "limits": limits, "seed": args.seed}
    folder, hand = (args.out / named(who, args.seed) for who in (peer, "hand"))
    folder.mkdir(parents=True, exist_ok=True)
    bench, spent = None, 0.0
    for done, limit in enumerate(limits):
        path, student = folder / f"{limit:g}.json", hand / f"{limit:g}.student.onnx"
        if path.exists():
            spent += known(path, asked)["cpu_seconds"]
            continue
        carried = 0.0
        if inherits:
            first = known(hand / path.name, asked)
            carried = first["cpu_seconds"] if first["kept"] < 1 else 0.0
        bench = bench or Bench(args.data, args.seed)
        began = time.perf_counter()
        account = Account((args.budget - spent) / (len(limits) - done), cpu_seconds(), carried)
        print(f"{peer}, {limit:g} times as fast, {account.seconds:.0f} CPU s", flush=True)
        model, how = build(Order(bench, limit, account, student))
        spent += account.spent
        onnx.checker.check_model(onnx.load_from_string(model))
        figures = {
            **asked, "limit": limit, "bfloat16": bench.halves,
            "cpu_seconds": round(account.spent, 1), "allowed": round(account.seconds, 1),
            "wall_seconds": round(time.perf_counter() - began, 1), "load": os.getloadavg()[0],
            "speedup": round(bench.speedup(model), 3), "size_bytes": len(model),
            **bench.scores(model), **how,
        }  # fmt: skip
        path.with_suffix(".onnx").write_bytes(model)
        path.write_text(json.dumps(figures, indent=1) + "\n")
        print(json.dumps(figures), flush=True)


def known(path: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """What ``path`` says of an artifact that was made as ``asked``."""
    if not path.exists():
        raise SystemExit(f"{path} is not there: python benchmarks/peers/run.py hand comes first")
    figures: dict[str, Any] = json.loads(path.read_text())
    for key, value in asked.items():
        if figures.get(key) != value:
            was = f"{path} was made with {key} {figures.get(key)}, not {value}"
            raise SystemExit(f"{was}: move it away, or name another folder with --out")
    return figures
