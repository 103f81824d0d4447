"""A device profile: what networks took on a device, in a file that can be carried.

JSON lines. The first says what device it was; each further one is a network that was timed, by the
signatures of its work, so that nothing but this file is needed to predict. Appended as they are
measured: a profile that was interrupted is a profile of fewer networks. A profile of few networks
may lean on that of another device, whose networks then stand in the file too.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from ..spaces.errors import BadInput
from .device import weight_bits_of
from .files import write_whole
from .signature import Signature

VERSION, LEANING = 1, 2  # of a file; the second holds another device's networks too


@dataclass(frozen=True)
class Timed:
    """One network on the device.

    counts: its work. ms: its latency, None where the runtime died of it. teacher_ms: that of the
    teacher beside it. session: number of the process that it was timed in. policy: its digest.
    """

    counts: Mapping[Signature, int]
    ms: float | None
    teacher_ms: float
    session: int
    policy: str = ""

    @property
    def beside(self) -> tuple[int, float]:
        """The same for networks that were timed beside one another, in units of one time."""
        return self.session, self.teacher_ms


@dataclass
class DeviceProfile:
    """device, fingerprint: as the runtime tells them. request: shape of each input, by name.
    network: digest of the teacher's work, whose time is the unit of all others. like: the profile
    of another device, for the same requests and network, that this one leans on. weight_bits: that
    an int8 weight may use there; by the rule for the device's facts where nobody has said."""

    device: Mapping[str, str]
    fingerprint: str
    request: Mapping[str, tuple[int, ...]]
    network: str
    timed: list[Timed] = field(default_factory=list)
    like: "DeviceProfile | None" = None
    weight_bits: int = 0

    def __post_init__(self) -> None:
        self.weight_bits = self.weight_bits or weight_bits_of(self.device)

    @classmethod
    def load(cls, path: Path) -> Self:
        """The profile in ``path``. A last line that was not written whole is left out.

        Raises BadInput with the line that is no profile's.
        """
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(
                f"no device profile at {path}: {error}; `flyweight profile --spec SPEC -o {path}` "
                "makes one, and a search of 15 trials or more leaves RUN_DIR/profile.jsonl"
            ) from error
        entries = []
        for number, line in enumerate(lines, 1):
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError as error:
                if number == len(lines) and number > 1:
                    break
                raise BadInput(f"{path}, line {number}: not JSON: {error}") from error
        if not entries or not isinstance(entries[0], dict) or "fingerprint" not in entries[0]:
            raise BadInput(f"{path} is no device profile; `flyweight profile` makes one")
        head = entries[0]
        if head.get("version") not in (VERSION, LEANING):
            raise BadInput(
                f"{path} is a device profile of version {head.get('version')!r}, but {VERSION} or "
                f"{LEANING} is needed; make it again with `flyweight profile`"
            )
        try:
            request = {str(k): tuple(map(int, v)) for k, v in head["request"].items()}
            found = cls(
                dict(head["device"]), head["fingerprint"], request, head["network"],
                weight_bits=int(head.get("weight_bits", 0)),  # an earlier flyweight did not say
            )  # fmt: skip
            if other := head.get("like"):
                found.like = cls(
                    dict(other["device"]), other["fingerprint"], request, found.network
                )
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise BadInput(f"{path}, line 1: no head of a device profile: {error!r}") from error
        for number, entry in enumerate(entries[1:], 2):
            try:
                of = found.like if entry.get("like") else found
                if of is None:
                    raise ValueError("line 1 names no other device")
                of.timed.append(_timed(entry))
            except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
                raise BadInput(f"{path}, line {number}: no timed network: {error!r}") from error
        return found

    def told(self) -> str:
        """Its device, for people."""
        facts = [f"{key}={value}" for key, value in self.device.items()]
        if "model" not in self.device:
            facts.append("of an earlier flyweight, which did not ask for the model of the CPU")
        return f"{self.fingerprint} ({', '.join(facts)})"

    def create(self, path: Path) -> None:
        """Writes the profile anew. Raises OSError."""
        head: dict[str, Any] = {
            "version": VERSION, "fingerprint": self.fingerprint, "device": dict(self.device),
            "request": {k: list(v) for k, v in self.request.items()}, "network": self.network,
            "weight_bits": self.weight_bits,
        }  # fmt: skip
        entries = [_plain(t) for t in self.timed]
        if self.like is not None:
            other = {"fingerprint": self.like.fingerprint, "device": dict(self.like.device)}
            head |= {"version": LEANING, "like": other}
            entries = [*(_plain(t) | {"like": True} for t in self.like.timed), *entries]
        lines = [json.dumps(head), *(json.dumps(entry) for entry in entries)]
        write_whole(path, "".join(f"{line}\n" for line in lines).encode())

    def append(self, path: Path, timed: Timed) -> None:
        """Adds a network here and at the end of ``path``. Raises OSError."""
        self.timed.append(timed)
        with path.open("a") as file:
            file.write(json.dumps(_plain(timed)) + "\n")

    def unavailable(self) -> frozenset[tuple[str, str] | Signature]:
        """Work that the runtime may die of: kinds and forms in networks that it died of, and in no
        other; of networks of which these do not say why, the pieces that are in no other (it may
        die of one size). What the device that this profile leans on dies of, this one has to show
        that it can do."""
        ran = [s for t in self.timed if t.ms is not None for s in t.counts]
        lived: set[tuple[str, str] | Signature] = {*ran, *((s.kind, s.form) for s in ran)}
        dead = [t.counts.keys() for t in self.timed if t.ms is None]
        found: set[tuple[str, str] | Signature] = {(s.kind, s.form) for each in dead for s in each}
        found -= lived
        for each in dead:
            if found.isdisjoint((s.kind, s.form) for s in each):
                found |= each
        if self.like is not None:
            found |= self.like.unavailable()
        return frozenset(found - lived)


def _plain(timed: Timed) -> dict[str, Any]:
    work = [
        [s.kind, s.form, s.place, list(s.sizes), s.nominal_ms, n] for s, n in timed.counts.items()
    ]
    return {
        "ms": timed.ms, "teacher_ms": timed.teacher_ms, "session": timed.session,
        "policy": timed.policy, "work": work,
    }  # fmt: skip


def _timed(entry: Mapping[str, Any]) -> Timed:
    ms, teacher_ms = entry["ms"], entry["teacher_ms"]
    for value in (teacher_ms,) if ms is None else (ms, teacher_ms):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"ms > 0 must hold, but got {value!r}")
    counts = {}
    for kind, form, place, sizes, nominal, n in entry["work"]:
        if not (math.isfinite(nominal) and nominal > 0 and n >= 1 and all(x >= 1 for x in sizes)):
            raise ValueError(f"sizes, nominal time and count must be above 0 in {kind} {form}")
        key = Signature(str(kind), str(form), str(place), tuple(map(int, sizes)), float(nominal))
        counts[key] = int(n)
    return Timed(counts, ms, teacher_ms, int(entry["session"]), str(entry.get("policy", "")))
