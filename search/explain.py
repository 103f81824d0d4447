"""Why a policy takes the time it takes, kernel by kernel, and what other choices would change."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..compressors import Prepared
from ..kernels import Array, KernelTime, LatencyPredictor, Signature
from ..spaces import BadInput, Blueprint, Impossible, Policy, Space
from .predict import named_profile, predictor_of
from .ready import make_space, prepare_task
from .run_files import PROFILE
from .spec import load_spec
from .store import read_policy, run_of

WIDTHS = 16  # of a layer, at most, at which its precisions are compared

Key = tuple[str, int]  # a kernel's name and how often it came before: a layer may run several times
Named = Mapping[Key, KernelTime]
Row = dict[str, Any]  # as JSON has it


def explain(
    policy_path: Path,
    spec_path: Path,
    profile_path: Path | None = None,
    *,
    allow_foreign: bool = False,
) -> dict[str, Any]:
    """The explanation of a policy from a device profile, by default the spec's or that of the run
    in whose artifacts the policy is. Raises BadInput."""
    policy, spec = read_policy(policy_path), load_spec(spec_path)
    if profile_path is None and spec.target.profile is None and (run := run_of(policy_path)):
        own = run / PROFILE
        profile_path = own if own.is_file() else None
    profile = named_profile(spec, spec_path, profile_path)
    prepared = prepare_task(spec)
    predictor = predictor_of(spec, prepared, profile, allow_foreign=allow_foreign)
    try:
        return explanation(prepared, make_space(prepared, spec), predictor, policy)
    except Impossible as error:
        raise BadInput(f"{policy_path}: {error}") from error


def explanation(
    prepared: Prepared, space: Space, predictor: LatencyPredictor, policy: Policy
) -> dict[str, Any]:
    """What ``flyweight explain --json`` prints and RUN_DIR/explain.json holds; times in ms.

    predicted_latency_ms, teacher_predicted_latency_ms: lower end, middle, upper end. kernels: in
    execution order, behind what a call takes by itself (no name); a kernel that only the teacher
    has, or only the policy, has no time in the other. kinds: those times by the kind of work.
    groups: what the next legal width down and up would change. layers: by how much int8 takes
    longer than fp32 at the legal widths of the layer's group, the rest of the policy as it is.

    Raises Impossible for what is no policy of this network, or would not run.
    """
    plan, teacher = prepared.plan(policy), prepared.plan(Policy())
    ends = predictor.predict([plan, teacher])
    if not np.isfinite(ends).all():
        raise Impossible("the runtime died of networks with work that this policy has")
    mine, theirs = _named(predictor.parts(plan)), _named(predictor.parts(teacher))
    return {
        "digest": policy.digest,
        "predicted_latency_ms": ends[0].tolist(),
        "teacher_predicted_latency_ms": ends[1].tolist(),
        "kernels": list(_kernels(plan, teacher, mine, theirs)),
        "kinds": _kinds(predictor, mine, theirs),
        "groups": _groups(prepared, space, predictor, plan),
        "layers": _layers(prepared, space, predictor, plan),
    }


def _named(parts: Iterable[KernelTime]) -> Named:
    seen: Counter[str] = Counter()
    out = {}
    for part in parts:
        out[part.name, seen[part.name]] = part
        seen[part.name] += 1
    return out


def _kernels(plan: Blueprint, teacher: Blueprint, mine: Named, theirs: Named) -> Iterator[Row]:
    if plan.policy.student != teacher.policy.student:  # a network of its own: names mean nothing
        theirs = {("", 0): theirs["", 0]}
    layers = {**teacher.network.layers, **plan.network.layers}
    made = {kernel.name: kernel.channels[1] for kernel in plan.kernels if kernel.weights}
    for key in _in_order(mine, theirs):
        part, was = mine.get(key), theirs.get(key)
        name = key[0]
        yield {
            "name": name,
            "kind": part.kind if part else theirs[key].kind,
            "width": made.get(name),
            "full_width": layers[name].out_channels if name in layers else None,
            "precision": part.precision if part else None,
            "ms": part.ms if part else None,
            "deviation_ms": part.deviation_ms if part else None,
            "teacher_ms": was.ms if was else None,
            "teacher_deviation_ms": was.deviation_ms if was else None,
        }


def _in_order(mine: Iterable[Key], theirs: Iterable[Key]) -> Iterable[Key]:
    """All of both; what only the teacher has stands where it stood there."""
    out, rest = [], list(theirs)
    for key in mine:
        if key in rest:
            at = rest.index(key)
            out += rest[:at]
            del rest[: at + 1]
        out.append(key)
    return dict.fromkeys([*out, *rest])


def _kinds(predictor: LatencyPredictor, mine: Named, theirs: Named) -> list[Row]:
    """Most time first. Taken together, kernels are better known than each for itself."""
    work: dict[tuple[str, str], tuple[Counter[Signature], Counter[Signature]]] = {}
    for at, named in enumerate((mine, theirs)):
        for part in named.values():
            both = work.setdefault((part.kind, part.precision), (Counter(), Counter()))
            both[at].update(part.work)
    rows = []
    for (kind, precision), both in work.items():
        (ms, deviation), (was, before) = predictor.times(both).tolist()
        row = {"kind": kind, "precision": precision, "ms": ms, "deviation_ms": deviation}
        rows.append(row | {"teacher_ms": was, "teacher_deviation_ms": before})
    return sorted(rows, key=lambda row: -max(row["ms"], row["teacher_ms"]))


def _groups(
    prepared: Prepared, space: Space, predictor: LatencyPredictor, plan: Blueprint
) -> list[Row]:
    rows: list[Row] = []
    cases: list[tuple[Row, str, int]] = []
    for name, widths in _widths(space, plan).items():
        now = plan.widths[name]
        row = {"name": name, "width": now, "full_width": plan.network.groups[name].width}
        row |= {"narrower": None, "wider": None}
        rows.append(row)
        cases += [(row, "narrower", width) for width in widths if width < now][-1:]
        cases += [(row, "wider", width) for width in widths if width > now][:1]
    others = [_with(plan.policy, width=(row["name"], width)) for row, _, width in cases]
    changes = predictor.changes([(plan, prepared.plan(policy)) for policy in others])
    for (row, side, width), change in zip(cases, changes, strict=True):
        row[side] = _case(width, change)
    return rows


def _layers(
    prepared: Prepared, space: Space, predictor: LatencyPredictor, plan: Blueprint
) -> list[Row]:
    legal = _widths(space, plan)
    rows: list[Row] = []
    cases: list[tuple[Row, int]] = []
    pairs = []
    for qualified, (student, layer) in space.layers.items():
        name, group = layer.name, layer.out_group if layer.out_group in legal else None
        both = {"fp32", "int8"} <= {*space.precisions[qualified]}
        if student != plan.policy.student or name not in plan.precision or not both:
            continue
        made = plan.network.shape(layer.op, plan.widths)
        now = plan.widths[group] if group else made[1 if layer.kind == "conv" else -1]
        row: Row = {"name": name, "group": group, "width": now, "widths": []}
        rows.append(row | {"precision": plan.precision[name]})
        for width in _some(legal[group], now) if group else [now]:
            policy = _with(plan.policy, width=(group, width)) if group else plan.policy
            fp32, int8 = (_with(policy, precision=(name, p)) for p in ("fp32", "int8"))
            cases.append((rows[-1], width))
            pairs.append((prepared.plan(fp32), prepared.plan(int8)))
    for (row, width), change in zip(cases, predictor.changes(pairs), strict=True):
        row["widths"].append(_case(width, change))
    return rows


def _case(width: int, change: Array) -> Row:
    """change: ms and deviation; None where the runtime would die of it."""
    ms, deviation = change.tolist() if np.isfinite(change).all() else (None, None)
    return {"width": width, "change_ms": ms, "deviation_ms": deviation}


def _widths(space: Space, plan: Blueprint) -> dict[str, tuple[int, ...]]:
    """The legal widths of every group that is left in the student of ``plan``."""
    return {
        group.name: space.widths[qualified]
        for qualified, (student, group) in space.groups.items()
        if student == plan.policy.student and group.name in plan.widths
    }


def _with(
    policy: Policy, width: tuple[str, int] | None = None, precision: tuple[str, str] | None = None
) -> Policy:
    """``policy`` with one group at another width, or one layer in another precision."""
    prune, quantize = policy.prune, policy.quantize
    if width is not None:
        prune = replace(prune, width={**prune.width, width[0]: width[1]})
    if precision is not None:
        quantize = replace(quantize, precision={**quantize.precision, precision[0]: precision[1]})
    return replace(policy, prune=prune, quantize=quantize)


def _some(widths: Sequence[int], now: int) -> list[int]:
    """At most ``WIDTHS`` of them and ``now``, the ends among them."""
    at = np.linspace(0, len(widths) - 1, min(len(widths), WIDTHS)).astype(int)
    return sorted({now, *(widths[i] for i in at)})
