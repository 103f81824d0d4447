"""What is to be said of how the trials of a search ended."""

from collections import Counter
from collections.abc import Sequence

from ..compressors import RUNGS
from .controller import Controller, failures
from .limits import COSTS, Limits
from .record import Entry
from .words import clock_time, milliseconds


def notes_of_end(controller: Controller, nothing_left: bool) -> list[str]:
    """What went wrong, or could be better. nothing_left: when the session began there was neither a
    trial nor time left."""
    notes, trials = [], controller.budget.trials
    if controller.fatal:
        notes.append(f"The search could not go on: {controller.fatal}")
    if reasons := fruitless(controller):
        told = "; ".join(f"{n}x {text}" for text, n in reasons)
        notes.append(f"No trial finished the full rung. Why trials failed: {told}")
    if nothing_left:
        notes.append(
            f"All {trials} trials had been had, or all of the time: only the front was made anew; "
            "raise search.trials or search.time_budget to search on"
        )
    elif controller.exhausted and len(controller.trials) < trials:
        notes.append(f"There were no further policies to try after {len(controller.trials)} trials")
    elif controller.unused_s() > 0 and controller.results(RUNGS[-1]):
        left = f"{clock_time(controller.unused_s())} of the time budget are left"
        if len(controller.trials) >= trials:
            notes.append(
                f"All {trials} trials were tried, but {left}: to use them, raise search.trials and "
                "go on with --resume, or search anew with more rungs.full_epochs, so that each "
                "trial trains longer"
            )
        else:
            notes.append(
                f"{left}, in which no trial could have ended: to search on, raise "
                "search.time_budget and go on with --resume"
            )
    if controller.exhausted and not controller.trials:
        session = _session(controller.record.entries())
        notes.append(f"No policy was tried: {unreached(session, controller.limits)}")
    elif not controller.trials and controller.late_to_look():
        notes.append(
            "No policy was tried: none within the limits was found in twice the time budget. Ask "
            "for less, or give more time"
        )
    if late := controller.late():
        notes.append(
            f"The trials in progress took {late:.0f} s longer than the time budget: it is short "
            "for a trial of this task"
        )
    return notes


def unreached(entries: Sequence[Entry], bounds: Limits) -> str:
    """How near to the limits the policies came that were over one, in words, and what to do."""
    known = [e for e in entries if e["kind"] == "rejected" and "latency_ms" in e]
    over: Counter[str] = Counter()
    for entry in known:
        found = {name: entry[name] for name in COSTS} | {"latency_ms": entry["latency_ms"][2]}
        over.update(name for name, most in bounds.costs().items() if found[name] > most)
    told, advice = [], "Ask for less"
    for name, most in bounds.costs().items():
        if not known or over[name] < len(known) / 2:
            continue
        if name == "latency_ms":
            low, _, high = min((e[name] for e in known), key=lambda interval: interval[2])
            told.append(
                f"of {len(known)} the fastest takes {milliseconds(low)} to {milliseconds(high)} "
                f"ms, the upper end of which must keep the limit of {milliseconds(most)}"
            )
            advice += ", or let `flyweight profile` make a device profile of more networks"
        else:
            least = min(e[name] for e in known)
            told.append(f"of {len(known)} the smallest has {name} of {least}, the limit is {most}")
    reasons = Counter(e["reason"] for e in entries if e["kind"] == "rejected")
    if reasons and not known:  # whatever the limits are
        (reason, count), *_ = reasons.most_common(1)
        return f"none has a price, {count} of {reasons.total()} because of: {reason}"
    return f"{'; '.join(told) or 'all that were proposed are over some limit'}. {advice}"


def fruitless(controller: Controller) -> list[tuple[str, int]]:
    """The commonest reasons of failure of a search that has no artifact for them."""
    if controller.results(RUNGS[-1]):
        return []
    return causes(controller.record.entries(), controller.hopeless())


def causes(entries: Sequence[Entry], hopeless: bool) -> list[tuple[str, int]]:
    """The commonest reasons of failure in a search without a full result: since it was last begun,
    and before too if it is hopeless."""
    return failures(entries if hopeless else _session(entries))


def _session(entries: Sequence[Entry]) -> Sequence[Entry]:
    """Those since the search was last begun."""
    return entries[max((i for i, e in enumerate(entries) if e["kind"] == "search"), default=0) :]
