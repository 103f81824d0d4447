"""What a search would do, before it costs anything; and single policies by hand."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..compressors import RUNGS, compress, untrained
from ..kernels import MeasuringProcess
from ..spaces import BadInput, Impossible, Policy, Space
from .counting import telling
from .limits import COSTS, Limits
from .meter import Meter
from .predict import given_profile, predictor_of
from .reach import CarefulMeter
from .ready import (
    Ready,
    facts_of,
    make_space,
    prepare_task,
    ready,
    score,
    trained_in_bfloat16,
)
from .spec import Objective, load_spec
from .storage import Storage
from .store import compressed_bytes, read_policy, write_artifact
from .whole import left_whole
from .words import metric_value, milliseconds, size

LISTED = 4  # names of what is not pruned for one reason
SHOWN = 40  # groups, and layers of one choice of precisions; --json has all


def make_plan(spec_path: Path, console: Console | None = None) -> dict[str, Any]:
    """Space, teacher, best case and expected cost of a search. Trains nothing.

    Metrics are on selection validation, the teacher's as well as the cases'. console: where it is
    told what takes its time; None for standard output.
    """
    spec = load_spec(spec_path)
    profile = given_profile(spec)
    with telling(f"Checking {spec.given_task} and tracing its model", console):
        found = ready(spec)
    start = spec.target.runtime, spec.target.threads, found.teacher, found.request()
    text = "Timing the teacher and the simplest policies, untrained"
    with telling(text, console), MeasuringProcess(*start) as process:
        meter = CarefulMeter(*start, process)
        teacher_ms = meter.alone()
        if profile is not None:  # a search would refuse what this refuses
            predictor_of(spec, found.prepared, profile, teacher_ms=teacher_ms)
        cases = _cases(found, meter, teacher_ms)
    limits = found.limits(teacher_ms)
    out_of_reach = limits.out_of_reach(cases)
    teacher = {
        "metric": found.metric,
        "metric_test": found.metric_test,
        "doubt": found.doubt,
        "latency_ms": teacher_ms,
        "size_bytes": len(found.teacher),
        "compressed_bytes": compressed_bytes(found.teacher),
        "parameters": found.prepared.network.parameters,
    }
    return {
        "task": spec.given_task,
        "space": {
            "groups": {n: list(w) for n, w in found.space.widths.items()},
            "layers": {n: list(p) for n, p in found.space.precisions.items()},
            "parameters": len(found.space.parameters),
            "size_log10": math.log10(found.space.size),
        },
        "left_whole": {
            student: left_whole(found.space, student, found.prepared.starts[student].model)
            for student in found.space.networks
        },
        "teacher": teacher,
        "limits": {name: getattr(limits, name) for name in ("max_drop", *COSTS)},
        "idle": idle(spec.objective, limits, teacher)
        + ([found.too_fine] if found.too_fine else []),
        "cases": cases,
        "fastest_ms": min((case["latency_ms"] for case in cases), default=None),
        "out_of_reach": list(out_of_reach),
        "reachable": not out_of_reach,
        "advice": found.advice(),
        "cost": {
            "trials": spec.search.trials,
            "time_budget_s": spec.search.time_budget,
            "full_epochs": spec.rungs.full_epochs,
            "samples": len(found.prepared.splits.train),
            "samples_of_a_full_trial": round(
                spec.rungs.full_epochs * len(found.prepared.splits.train)
            ),
        },
    }


def _cases(found: Ready, meter: Meter, teacher_ms: float) -> list[dict[str, Any]]:
    """The simplest policies, untrained: their figures, timed here and now."""
    named = [("smallest", policy) for policy in found.smallest()]
    cases = []
    for name, policy in [*named, *(("uniform", policy) for policy in found.recipes())]:
        try:
            # First, as this process would not outlive what the runtime dies of.
            latency = meter.provisional(untrained(found.prepared, policy))[1]
            model = compress(found.prepared, policy, RUNGS[0]).model
            metric = score(found.prepared, model, found.prepared.splits.selection)
        except Impossible:  # a search would leave it out and try others
            continue
        cases.append(
            {
                "kind": name,
                "digest": policy.digest,
                "kept": _kept(found.space, policy),
                "dropped": list(policy.prune.drop),
                "int8_layers": len(policy.quantize.precision),
                "latency_ms": latency,
                "speedup": teacher_ms / latency,
                "metric_untrained": metric if math.isfinite(metric) else None,
                "size_bytes": len(model),
                "compressed_bytes": compressed_bytes(model),
            }
        )
    return cases


def idle(objective: Objective, limits: Limits, teacher: Mapping[str, Any]) -> list[str]:
    """The limits that ask for nothing, since the teacher itself keeps them, or has no more to lose;
    with why, a sentence each. teacher: its ``metric`` and its ``COSTS``."""
    told = []
    if limits.max_drop is not None and 0 < teacher["metric"] <= limits.max_drop:
        told.append(
            f"max_drop {limits.max_drop:g} asks for nothing: all that the model has of the metric "
            f"is {metric_value(teacher['metric'])}"
        )
    for name, most in limits.costs().items():
        if teacher[name] > most:
            continue
        asked = "speedup" if name == "latency_ms" and objective.speedup else name
        amounts = f"{_amount(name, teacher[name])}, and the limit is {_amount(name, most)}"
        told.append(
            f"{asked} {getattr(objective, asked)} asks for nothing: the model itself has {amounts}"
        )
    return told


def _kept(space: Space, policy: Policy) -> float:
    network = space.networks[policy.student]
    full = sum(group.width for group in network.groups.values())
    left = network.without(policy.prune.drop).groups
    return sum(policy.prune.width.get(n, g.width) for n, g in left.items()) / max(1, full)


def print_plan(plan: dict[str, Any], console: Console | None = None) -> None:
    """The plan for people."""
    console = console or Console(emoji=False)
    teacher, space = plan["teacher"], plan["space"]
    on_test = teacher["metric_test"]
    test = "" if on_test is None else f" ({metric_value(on_test)} on test)"
    console.print(
        f"{plan['task']}: metric {metric_value(teacher['metric'])} on selection validation{test}, "
        f"{milliseconds(teacher['latency_ms'])} ms, {teacher['parameters'] / 1e6:.2f} M parameters",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    if teacher["doubt"]:
        console.print(f"Note: {teacher['doubt']}", markup=False, soft_wrap=True)
    console.print(
        f"Space: {len(space['groups'])} groups, {len(space['layers'])} layers, "
        f"about 10^{space['size_log10']:.0f} policies"
    )
    _print_groups(space["groups"], console)
    _print_layers(space["layers"], console)
    for student, names in plan["left_whole"].items():
        _print_whole(student, names, console)
    table = Table(title="Untrained, timed on this machine")
    for name in ("policy", "kept", "int8 layers", "latency ms", "speed-up", "metric untrained"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for case in plan["cases"]:
        table.add_row(
            case["kind"], f"{case['kept']:.0%}", str(case["int8_layers"]),
            milliseconds(case["latency_ms"]), f"{case['speedup']:.2f}x",
            "none" if case["metric_untrained"] is None else metric_value(case["metric_untrained"]),
        )  # fmt: skip
    console.print(table)
    for name in COSTS:
        _print_limit(plan, name, console)
    for note in plan["idle"]:
        console.print(f"Note: {note}", markup=False, soft_wrap=True)
    if not plan["reachable"]:
        console.print(
            f"{plan['advice']}; the search would refuse.",
            markup=False,
            soft_wrap=True,
        )
    cost = plan["cost"]
    seconds = cost["time_budget_s"]
    budget = ""
    if seconds:
        long = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.3g} min"
        budget = f" in about {long}, preparation included, and then the finalists"
    console.print(
        f"Cost: up to {cost['trials']} trials{budget}; a full trial trains {cost['full_epochs']:g} "
        f"{'epoch' if cost['full_epochs'] == 1 else 'epochs'} of {cost['samples']:,} samples "
        "(rungs.full_epochs)",
        soft_wrap=True,
    )


def _print_groups(groups: dict[str, list[int]], console: Console) -> None:
    if not groups:
        return
    table = Table(title="Groups of channels that may be pruned")
    for name in ("group", "channels", "at least", "choices"):
        table.add_column(name, justify="left" if name == "group" else "right")
    for name, widths in list(groups.items())[:SHOWN]:
        row = [name, str(max(widths)), str(min(widths)), str(len(widths))]
        table.add_row(*(Text(cell) for cell in row))  # Text: names are no markup
    console.print(table)
    if len(groups) > SHOWN:
        console.print(f"and {len(groups) - SHOWN} more groups (--json lists all)")


def _print_layers(layers: dict[str, list[str]], console: Console) -> None:
    by_choice: dict[str, list[str]] = {}
    for name, precisions in layers.items():
        by_choice.setdefault(" or ".join(precisions), []).append(name)
    for choice, names in by_choice.items():
        rest = f" and {len(names) - SHOWN} more (--json lists all)" if len(names) > SHOWN else ""
        line = f"Layers in {choice}: {', '.join(names[:SHOWN])}{rest}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _print_whole(student: str, names: dict[str, str], console: Console) -> None:
    by_reason: dict[str, list[str]] = {}
    for name, reason in names.items():
        by_reason.setdefault(reason, []).append(name)
    whose = "" if student == "pruned" else f" of student {student}"
    for reason, known in by_reason.items():
        rest = f" and {len(known) - LISTED} more" if len(known) > LISTED else ""
        line = f"Not pruned{whose}: {', '.join(known[:LISTED])}{rest} ({reason})"
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _print_limit(plan: dict[str, Any], name: str, console: Console) -> None:
    limit = plan["limits"][name]
    if limit is None or not plan["cases"]:
        return
    least = min(case[name] for case in plan["cases"])
    verdict = "within reach" if least <= limit else "perhaps within reach"
    if name in plan["out_of_reach"]:
        verdict = "OUT OF REACH of this space"
    console.print(
        f"Limit: {_amount(name, limit)}, {verdict} (least {_amount(name, least)}, "
        f"{plan['teacher'][name] / least:.2f} times less than the teacher)",
        soft_wrap=True,
    )


def _amount(name: str, value: float) -> str:
    if name == "latency_ms":
        return f"{milliseconds(value)} ms"
    return size(value) + (" compressed" if name == "compressed_bytes" else "")


def space_of(spec_path: Path) -> Space:
    """The space of a spec."""
    spec = load_spec(spec_path)
    prepared = prepare_task(spec)
    return make_space(prepared, spec)


def replay(policy_path: Path, spec_path: Path, rung: str, out: Path) -> dict[str, Any]:
    """Rebuilds the artifact of a policy up to ``rung`` into ``out``; its facts. Raises BadInput for
    a policy that is none of this task."""
    policy, spec = read_policy(policy_path), load_spec(spec_path)
    so = trained_so(policy_path)
    prepared = prepare_task(spec, bfloat16=[policy.student] if so else [])
    try:
        prepared.plan(policy)
    except Impossible as error:  # the policy of another network, say
        raise BadInput(f"{policy_path}: {error}") from error
    if so is None and (names := trained_in_bfloat16(spec, prepared, [policy.student])):
        prepared = prepared.training_in_bfloat16(names)
    candidate = compress(prepared, policy, rung, seed=spec.search.seed)
    facts = facts_of(spec, prepared.runtime.fingerprint)
    facts |= {"bfloat16": prepared.trains_in_bfloat16(policy.student)}
    path = write_artifact(Storage(out), candidate, facts)
    return {
        "digest": policy.digest, "artifact": str(out / path), "rung": rung,
        "metric": candidate.metric, "loss": candidate.loss, "size_bytes": len(candidate.model),
    }  # fmt: skip


def trained_so(policy_path: Path) -> bool | None:
    """Whether the artifact beside ``policy_path`` was trained in bfloat16; None where there is none
    that says it."""
    try:
        found = json.loads(policy_path.with_name("metrics.json").read_text()).get("bfloat16")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, bool) else None
