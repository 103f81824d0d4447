"""``compress``: a policy at a rung, from the teacher or the rung before, to a candidate."""

import copy
import math
import statistics
import time
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..kernels import Session
from ..spaces import Blueprint, Impossible, Policy
from ..spaces.parameter import RUNGS
from .correct import correct_
from .data import Items, at_once
from .distill import Diverged, distill, kl_divergence
from .equalize import equalize
from .export import to_onnx
from .freeze import freeze
from .parity import Parity, check_parity, run_session
from .prepared import Prepared
from .prune import kept_channels, lay_out, recompute_statistics, remove
from .quantize import calibrate, fold_norms, insert_quantizers, settle
from .reconstruct import reconstruct_
from .renorm import fold_again, restore_norms
from .sparsify import sparsify_
from .task import metric_of

# Training that takes a student this many times as far from the teacher as it was gives it up: of 33
# recorded trials that the short rung harmed, the 30 harmed 25 times and more ended worse than
# untrained, the 3 harmed 1.3 times at most ended better (docs/benchmarks.md).
HARMED = 2.0
# KL in nats, of classes: so near to its teacher a student is trained no more. Of three on record
# that were, and were trained for minutes all the same, all three ended farther away; what such
# artifacts lose on the test set is within its noise (docs/benchmarks.md).
NEAR = 0.002
# Of the training, at the end, with quantizers in place. Half recovers more of what weights of 2
# bits lose, but costs 0.35 points at 8 bits, where a quarter costs none (docs/benchmarks.md).
QAT_SHARE = 0.25
EQUALIZED = 256  # items that channels are equalized on: a loud value missed is clipped behind ReLU6
# Items that batch-norm statistics are averaged over, and that layers are fitted on, all at once;
# bytes of the largest value of theirs. MobileNetV2 at 224 x 224 takes all of them, fitting 3 GB.
BATCH, BATCH_ROOM = 128, 640 << 20
FITTED, FITTED_ROOM = 64, 320 << 20
PARTS = 20  # of selection validation, that say how sure a drop of the metric is


@dataclass(frozen=True)
class Candidate:
    """What a trial holds at a rung.

    student: in float, with its norms, as the next rung goes on from it. model: the artifact
    (ONNX). loss, metric: of the artifact in the target's runtime; KL to the teacher on search
    validation, and the task's metric there, at the full rung on selection validation. samples,
    seconds: what all rungs so far have cost. parity: at the full rung. settled: it is trained no
    more, because training took it away from the teacher, so that what it was before is kept, or
    because it is near. diverged: how, where that training diverged. drop_error: at the full rung,
    see there.
    """

    policy: Policy
    rung: str
    plan: Blueprint
    student: fx.GraphModule
    model: bytes
    loss: float
    metric: float
    samples: int
    seconds: float
    parity: Parity | None = None
    settled: bool = False
    diverged: str | None = None
    drop_error: float | None = None


def compress(
    prepared: Prepared,
    policy: Policy,
    rung: str,
    previous: Candidate | None = None,
    seed: int = 0,
) -> Candidate:
    """Builds ``policy`` at ``rung``; going on from ``previous`` where it is given.

    Pure: nothing passed in is changed. Raises Impossible when this policy cannot be built,
    trained or run as it was trained.
    """
    if rung not in RUNGS:
        raise ValueError(f"rung must be one of {RUNGS}, but got {rung!r}")
    before = RUNGS[: RUNGS.index(rung)][-1:]
    if previous is not None and (previous.policy, (previous.rung,)) != (policy, before):
        raise ValueError(
            f"{rung!r} goes on from the rung before it of the same policy, but got "
            f"{previous.rung!r} of {previous.policy.canonical()}"
        )
    if previous is None and before:
        previous = compress(prepared, policy, before[0], None, seed)
    began = time.perf_counter()
    plan = prepared.plan(policy)
    torch.manual_seed(seed)
    samples = previous.samples if previous else 0
    seconds = previous.seconds if previous else 0.0
    settled = previous is None or previous.settled
    diverged = previous.diverged if previous else None

    def as_before() -> Candidate:
        """``previous``, trained no more: its figures are of the same items."""
        assert previous is not None
        return replace(
            previous, rung=rung, samples=samples, diverged=diverged, settled=True,
            seconds=seconds + time.perf_counter() - began,
        )  # fmt: skip

    if settled and rung == "short":
        return as_before()
    student, made = _start(prepared, policy, plan, previous), None
    if not settled:
        assert previous is not None
        try:
            made, more = _trained(prepared, policy, plan, student, rung, seed)
            harmed = _harmed(policy, rung, previous.loss, made.loss)
        except Diverged as error:
            if not _asked_near(policy):
                raise
            more, harmed, diverged = error.samples, True, str(error)
        samples += more
        if harmed:
            if rung == "short":
                return as_before()
            settled, made = True, None
            student = _start(prepared, policy, plan, previous)
    made = made or _artifact(prepared, quantize(prepared, policy, plan, student))
    splits, task = prepared.splits, prepared.task
    if rung != "full":
        metric, parity = metric_of(task, made.answers, splits.search.targets), None
        doubt = None
    else:
        theirs = prepared.selection_answers  # first, as in _artifact
        answers = _answers(made.session, splits.selection)
        metric = metric_of(task, answers, splits.selection.targets)
        doubt = drop_error(task, answers, theirs, splits.selection)
        precision = "int8" if plan.quantized else "fp32"
        parity = check_parity(
            made.frozen, made.model, answers, splits.selection, precision, prepared.runtime,
            prepared.kind,
        )  # fmt: skip
    settled = settled and previous is not None
    near = rung != "full" and _near(prepared, policy, made.loss)
    lay_out(student, torch.contiguous_format)
    seconds += time.perf_counter() - began
    return Candidate(
        policy, rung, plan, student, made.model, made.loss, metric, samples, seconds, parity,
        settled or near, diverged, doubt,
    )  # fmt: skip


def drop_error(task: Any, answers: Tensor, reference: Tensor, items: Items) -> float | None:
    """The standard error of what ``answers`` lose of the metric against ``reference``, both to
    ``items``: each of up to PARTS parts of these is judged by itself.

    None where that cannot be told: of a part with one class some metrics do not exist.
    """
    count, drops = min(PARTS, len(items)), []
    for first in range(count):
        part = torch.arange(first, len(items), count)
        targets = items.take(part).targets
        try:
            with warnings.catch_warnings():  # of classes that a part lacks
                warnings.simplefilter("ignore")
                theirs, ours = (metric_of(task, x[part], targets) for x in (reference, answers))
        except Exception:  # the user's code, on fewer items than it was made for
            return None
        drops.append(theirs - ours)
    if count < 2 or not all(map(math.isfinite, drops)):
        return None
    return statistics.stdev(drops) / math.sqrt(count)


def _start(
    prepared: Prepared, policy: Policy, plan: Blueprint, previous: Candidate | None
) -> fx.GraphModule:
    """What a rung begins with, a copy."""
    if previous is None:
        return prune(prepared, policy, plan)
    return lay_out(copy.deepcopy(previous.student), torch.channels_last)


def _asked_near(policy: Policy) -> bool:
    """Whether the student is to be near to its teacher. Who trains by the labels alone has not
    asked for that: there training is never given up."""
    return policy.distill is None or policy.distill.alpha > 0


def _near(prepared: Prepared, policy: Policy, loss: float) -> bool:
    """Whether a student answers as its teacher does, as far as can be told. Of many answers an
    item, as pixels are, most may be told apart by nobody and hide the rest."""
    one = prepared.kind.axis is not None and prepared.search_answers.ndim == 2  # [N, classes]
    return one and _asked_near(policy) and loss < NEAR


def _harmed(policy: Policy, rung: str, before: float, after: float) -> bool:
    """Whether training is given up."""
    return _asked_near(policy) and after > before * (HARMED if rung == "short" else 1.0)


@dataclass(frozen=True)
class _Artifact:
    """A student as it is deployed. answers, loss: of the runtime, on search validation."""

    frozen: fx.GraphModule
    model: bytes
    session: Session
    answers: Tensor
    loss: float


def _trained(
    prepared: Prepared,
    policy: Policy,
    plan: Blueprint,
    student: fx.GraphModule,
    rung: str,
    seed: int,
) -> tuple[_Artifact, int]:
    """The artifact of ``student`` after what is trained at ``rung``, in place; samples seen."""
    samples = _train(prepared, policy, student, rung, seed)
    quantized = quantize(prepared, policy, plan, student)
    if rung == "full" and plan.quantized and policy.quantize.qat and policy.distill:
        norms = restore_norms(quantized, student, plan.network, prepared.splits.calibration)
        try:
            samples += _train(prepared, policy, quantized, "qat", seed)
        except Diverged as error:
            error.samples += samples
            raise
        if norms:  # in a few steps their running statistics do not get there
            renew_statistics(quantized, prepared, plan)
        fold_again(quantized, norms)
        settle(quantized, plan.network, plan)
    return _artifact(prepared, quantized), samples


def _artifact(prepared: Prepared, quantized: fx.GraphModule) -> _Artifact:
    """Freezes ``quantized``, which is of no use afterwards."""
    frozen = freeze(quantized)
    _let_go(quantized)
    model = to_onnx(frozen, prepared.example)
    session = prepared.runtime.load(model)
    theirs = prepared.search_answers  # first: what the teacher cannot answer is not the artifact's
    answers = _answers(session, prepared.splits.search)
    loss = kl_divergence(answers, theirs, kind=prepared.kind).item()
    return _Artifact(frozen, model, session, answers, loss)


def _let_go(graph: fx.GraphModule) -> None:
    """A module and its graph hold each other: without this a model's worth of memory would stay
    until Python's collector comes. The module cannot be changed any more."""
    graph.graph.owning_module = None


def _answers(session: Session, items: Items) -> Tensor:
    answers = run_session(session, items)
    if not torch.isfinite(answers).all():
        raise Impossible("the artifact answers NaN or infinity on validation")
    return answers


def prune(prepared: Prepared, policy: Policy, plan: Blueprint) -> fx.GraphModule:
    """The network the student starts from, pruned, as a traced graph ready to be trained: its
    weights reconstructed, its smallest ones 0 and its statistics recomputed as the policy says."""
    start = prepared.start(policy)
    widths = {name: plan.widths[name] for name in policy.prune.width}
    criterion = policy.prune.criterion
    scores = prepared.importance(policy.student, criterion) if widths else {}
    kept = kept_channels(scores, widths, start.network.groups)
    drop = policy.prune.drop
    pruned = remove(start.model, start.network, prepared.example, kept, drop)
    if kept and policy.prune.reconstruct:
        moments = prepared.input_moments(policy.student)
        reconstruct_(pruned, start.model, plan.network, kept, moments)
    if policy.prune.sparsity:
        sparsify_(pruned, plan.network, policy.prune.sparsity)
    student = lay_out(pruned, torch.channels_last)
    if policy.prune.acts:
        renew_statistics(student, prepared, plan)
    return student


def renew_statistics(student: fx.GraphModule, prepared: Prepared, plan: Blueprint) -> None:
    """Batch-norm statistics of ``student`` as the calibration items have them, in place."""
    batch = at_once(plan.network, BATCH, BATCH_ROOM)
    recompute_statistics(student, prepared.splits.calibration, batch)


def quantize(
    prepared: Prepared, policy: Policy, plan: Blueprint, student: fx.GraphModule
) -> fx.GraphModule:
    """The student with folded norms and calibrated quantizers where the blueprint wants them."""
    folded = fold_norms(student, plan.network)
    if not plan.quantized:
        return folded
    how, items = policy.quantize.calibration, prepared.splits.calibration
    if how == "fitted":
        folded = equalize(folded, plan.network, plan, items.first(EQUALIZED))
    quantized = insert_quantizers(folded, plan, how)
    _let_go(folded)
    del folded
    calibrate(quantized, items, how)
    if how == "fitted":
        correct_(quantized, items.first(at_once(plan.network, FITTED, FITTED_ROOM)))
    settle(quantized, plan.network, plan)
    return quantized


def _train(
    prepared: Prepared, policy: Policy, module: fx.GraphModule, stage: str, seed: int
) -> int:
    """The share of the distillation that belongs to ``stage``, in place; samples seen."""
    if policy.distill is None:
        return 0
    schedule = prepared.schedule
    short, last = schedule.short, 1.0
    if policy.quantize.acts and policy.quantize.qat:
        last -= QAT_SHARE
    begin, end = {"short": (0.0, short), "full": (short, last), "qat": (last, 1.0)}[stage]
    # Training with quantizers is the end of the same training: its learning rate goes on falling.
    cycle = (0.0, short) if stage == "short" else (short, 1 - short)
    return distill(
        module,
        prepared.epoch,
        (end - begin) * schedule.full_epochs,
        policy.distill,
        prepared.task.loss,
        peak=policy.distill.learning_rate,
        batch=schedule.batch,
        seed=seed,
        first=begin * schedule.full_epochs,
        cycle=(cycle[0] * schedule.full_epochs, cycle[1] * schedule.full_epochs),
        hold_zeros=policy.prune.sparsity > 0,
        device=prepared.device,
        # With quantizers in place bfloat16 would round as coarsely as they do.
        halves=stage != "qat" and prepared.trains_in_bfloat16(policy.student),
        kind=prepared.kind,
    )
