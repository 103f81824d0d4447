"""``compress``: a policy at a rung, from the teacher or the rung before, to a candidate."""

import copy
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..spaces import Blueprint, Impossible, Policy, blueprint
from ..spaces.tracing import trace_graph
from .distill import distill, kl_divergence
from .export import to_onnx
from .freeze import freeze
from .parity import Parity, check_parity, run_module, run_session
from .prepared import Prepared
from .prune import kept_channels, recompute_statistics, remove
from .quantize import calibrate, fold_norms, insert_quantizers

RUNGS = ("recalibrate", "short", "full")
QAT_SHARE = 0.25  # of the training, at the end, with quantizers in place
QAT_RATE = 0.1  # of the learning rate: the weights are near their place already
STATISTICS = 2_048  # items for batch-norm statistics


@dataclass(frozen=True)
class Candidate:
    """What a trial holds at a rung.

    student: in float, with its norms, as the next rung goes on from it. model: the artifact
    (ONNX), None where the rung builds none. loss: KL to the teacher on search validation.
    metric: on search validation by the student; at the full rung on selection validation by the
    artifact in the target's runtime. samples, seconds: what all rungs so far have cost.
    """

    policy: Policy
    rung: str
    plan: Blueprint
    student: fx.GraphModule
    model: bytes | None
    loss: float
    metric: float
    samples: int
    seconds: float
    parity: Parity | None = None


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
    began = time.perf_counter()
    plan = blueprint(prepared.network, policy, prepared.runtime.capabilities)
    if previous is None and rung != "recalibrate":
        previous = compress(prepared, policy, RUNGS[RUNGS.index(rung) - 1], None, seed)
    torch.manual_seed(seed)
    samples = previous.samples if previous else 0
    seconds = previous.seconds if previous else 0.0
    if previous is None:
        student = prune(prepared, policy, plan)
    else:
        student = copy.deepcopy(previous.student)
        samples += _train(prepared, policy, student, rung, seed)
    quantized = quantize(prepared, policy, plan, student)
    if rung == "full" and plan.quantized and policy.quantize.qat and policy.distill:
        samples += _train(prepared, policy, quantized, "qat", seed)
    answers = run_module(quantized, prepared.splits.search)
    candidate = Candidate(
        policy=policy,
        rung=rung,
        plan=plan,
        student=student,
        model=None,
        loss=kl_divergence(answers, prepared.search_answers).item(),
        metric=prepared.task.metric(answers, prepared.splits.search.targets),
        samples=samples,
        seconds=0.0,
    )
    if rung != "short":
        candidate = _artifact(prepared, candidate, quantized)
    return replace(candidate, seconds=seconds + time.perf_counter() - began)


def prune(prepared: Prepared, policy: Policy, plan: Blueprint) -> fx.GraphModule:
    """The pruned teacher as a traced graph, its statistics recomputed, ready to be trained."""
    widths = {name: plan.widths[name] for name in policy.prune.width}
    scores = prepared.importance(policy.prune.criterion) if widths else {}
    kept = kept_channels(scores, widths)
    pruned = remove(prepared.teacher, prepared.network, prepared.example, kept)
    student = trace_graph(pruned, prepared.example)
    if kept:
        recompute_statistics(student, statistics_items(prepared))
    return student


def statistics_items(prepared: Prepared) -> Any:
    train = prepared.splits.train
    return train.take(torch.arange(min(STATISTICS, len(train))))


def quantize(
    prepared: Prepared, policy: Policy, plan: Blueprint, student: fx.GraphModule
) -> fx.GraphModule:
    """The student with folded norms and calibrated quantizers where the blueprint wants them."""
    folded = fold_norms(student, prepared.network)
    if not plan.quantized:
        return folded
    how = policy.quantize.calibration
    quantized = insert_quantizers(folded, prepared.network, plan, how)
    calibrate(quantized, prepared.splits.calibration, how)
    return quantized


def _train(
    prepared: Prepared, policy: Policy, module: fx.GraphModule, stage: str, seed: int
) -> int:
    """The share of the distillation that belongs to ``stage``, in place; samples seen."""
    if policy.distill is None:
        return 0
    schedule = prepared.schedule
    qat = policy.quantize.acts and policy.quantize.qat
    short = schedule.short
    shares = {
        "short": short,
        "full": 1 - short - (QAT_SHARE if qat else 0.0),
        "qat": QAT_SHARE,
    }
    firsts = {"short": 0.0, "full": short, "qat": 1 - QAT_SHARE}
    return distill(
        module,
        prepared.epoch,
        shares[stage] * schedule.full_epochs,
        policy.distill,
        prepared.task.loss,
        peak=policy.distill.learning_rate * (QAT_RATE if stage == "qat" else 1.0),
        batch=schedule.batch,
        seed=seed,
        first=int(firsts[stage] * schedule.full_epochs),
        train_norms=stage != "qat",
    )


def _artifact(prepared: Prepared, candidate: Candidate, quantized: fx.GraphModule) -> Candidate:
    """Builds the artifact; at the full rung scored by the target's runtime and held to parity."""
    frozen = freeze(quantized, prepared.network, candidate.plan)
    model = to_onnx(frozen, prepared.example)
    if candidate.rung != "full":
        return replace(candidate, model=model)
    selection = prepared.splits.selection
    answers = run_session(prepared.runtime.load(model), selection)
    if not torch.isfinite(answers).all():
        raise Impossible("the artifact answers NaN or infinity on selection validation")
    precision = "int8" if candidate.plan.quantized else "fp32"
    parity = check_parity(frozen, answers, selection, precision, prepared.runtime.load)
    metric = prepared.task.metric(answers, selection.targets)
    return replace(candidate, model=model, metric=metric, parity=parity)
