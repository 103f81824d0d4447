"""`flyweight explain`: on a device whose truth is known, through the command line."""

import json
import math
import random
import re
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from flyweight.kernels import DeviceProfile, Signature, Timed, signature
from flyweight.search.cli import main
from flyweight.search.explained import slower_in_int8, time_of
from flyweight.search.meter import Meter
from flyweight.search.predict import given_profile
from flyweight.search.profiling import empty_profile, mixed_policies
from flyweight.search.ready import make_space, prepare_task
from flyweight.search.spec import load_spec
from flyweight.search.words import milliseconds
from flyweight.spaces import BadInput, Policy

TASK = """
import torch
from torch import nn
from flyweight.compressors import ClassificationTask

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.c1, self.c2 = nn.Conv2d(32, 40, 3, padding=1), nn.Conv2d(40, 32, 3, padding=1)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.c2(torch.relu(self.c1(x))))
        return self.head(x.mean((2, 3)))

class Patterns(ClassificationTask):
    def __init__(self):
        torch.manual_seed(0)
        self.train = self.val = [(torch.randn(3, 8, 8), i % 5) for i in range(60)]

    def model(self):
        return Net()

    def students(self):
        return {"tiny": nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 5))}
"""
SPEC = """
task: task.py:Patterns
objective: {max_drop: 1}
space:
  prune: {multiple_of: 8, min_keep: 0.2, depth: true}
  distill: {students: [pruned, tiny]}
tracking: null
"""
MIXED = {
    "version": 1,
    "prune": {"width": {"c1": 16}},
    "quantize": {"precision": {"c1": "int8", "c2": "int8"}},
}


def truth(s: Signature) -> float:
    """What a piece takes on the device of these tests, in ms: in int8 a convolution takes a quarter
    of its work, and for each position and channel read what 19 channels made cost: it is the slower
    one below 25."""
    if not s.kind.startswith("conv"):
        return 3 * s.nominal_ms
    read, made, positions = s.sizes
    return read * positions * (made if s.kind == "conv fp32" else made / 4 + 19) / 50e3


@pytest.fixture(autouse=True)
def as_fast_as_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher takes here what it took in the profile."""
    monkeypatch.setattr(Meter, "alone", lambda _: 1.0)


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(w) for w in words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task, its search.yaml, and a profile of another device, so that nothing is timed."""
    folder = tmp_path_factory.mktemp("explain")
    (folder / "task.py").write_text(TASK)
    (folder / "search.yaml").write_text(SPEC)
    spec = load_spec(folder / "search.yaml")
    prepared = prepare_task(spec)
    profile = replace(empty_profile(spec, prepared), fingerprint="0" * 16)
    drawn = list(islice(mixed_policies(make_space(prepared, spec), 0), 600))
    whole = [p for p in drawn if p.student == "pruned" and not p.prune.drop]
    policies, rng = [*whole[:200], *drawn[:60]], random.Random(0)
    for number, policy in enumerate(policies):
        counts = signature(prepared.plan(policy))
        ms = rng.gauss(1, 0.005) * sum(n * truth(s) for s, n in counts.items())
        profile.timed.append(Timed(counts, ms, 1.0, number // 36))
    profile.create(folder / "profile.jsonl")
    return folder


class Case:
    """A policy in the fixture's folder, and what the commands say of it."""

    def __init__(self, folder: Path, policy: dict[str, Any]) -> None:
        self.folder, self.path = folder, folder / f"{random.random()}.json"
        self.path.write_text(json.dumps(policy))
        self.policy = policy

    def words(self, command: str) -> tuple[object, ...]:
        spec, profile = self.folder / "search.yaml", self.folder / "profile.jsonl"
        return command, self.path, "--spec", spec, "--profile", profile, "--allow-foreign"

    def explained(self) -> dict[str, Any]:
        done = run(*self.words("explain"), "--json")
        assert done.exit_code == 0, done.output
        return json.loads(done.output)  # type: ignore[no-any-return]

    def predicted(self) -> float:
        done = run(*self.words("predict"), "--json")
        assert done.exit_code == 0, done.output
        return float(json.loads(done.output)[0]["predicted_latency_ms"][1])


def test_a_policy_that_the_runtime_dies_of_is_told_so(folder: Path, tmp_path: Path) -> None:
    """The others of the same call are predicted all the same, and the JSON is JSON."""
    profile = DeviceProfile.load(folder / "profile.jsonl")
    for number, timed in enumerate(profile.timed):
        if any("int8" in s.kind for s in timed.counts):
            profile.timed[number] = replace(timed, ms=None)
    profile.create(tmp_path / "profile.jsonl")
    deadly, alive = Case(folder, MIXED), Case(folder, {"version": 1})
    command, path, *words = deadly.words("predict")
    words[words.index(folder / "profile.jsonl")] = tmp_path / "profile.jsonl"
    done = run(command, path, alive.path, *words, "--json")
    assert done.exit_code == 0, done.output
    first, second = json.loads(done.output, parse_constant=pytest.fail)
    assert first["predicted_latency_ms"] is None
    assert len(second["predicted_latency_ms"]) == 3
    done = run(command, path, alive.path, *words)
    assert done.exit_code == 0, done.output
    assert f"{path}: the runtime died of networks" in done.output
    assert f"{alive.path}: " in done.output.splitlines()[1]


def test_a_profile_of_too_few_networks_is_refused_before_anything_else(folder: Path) -> None:
    spec = load_spec(folder / "search.yaml")
    path = folder / "few.jsonl"
    profile = DeviceProfile.load(folder / "profile.jsonl")
    replace(profile, timed=[]).create(path)
    target = spec.target.model_copy(update={"profile": str(path)})
    with pytest.raises(BadInput, match=f"target.profile: {path}: .* at least 20 .* but .* has 0"):
        given_profile(spec.model_copy(update={"target": target}))


def test_milliseconds_of_no_number() -> None:
    assert milliseconds(math.inf) == "inf"
    assert milliseconds(math.nan) == "nan"


def test_times_of_kernels_add_up_to_what_is_predicted(folder: Path) -> None:
    case, teacher = Case(folder, MIXED), Case(folder, {"version": 1})
    found = case.explained()
    assert found["digest"] == Policy.from_dict(MIXED).digest
    middle, whole = found["predicted_latency_ms"][1], found["teacher_predicted_latency_ms"][1]
    assert middle == pytest.approx(case.predicted(), rel=1e-9)
    assert whole == pytest.approx(teacher.predicted(), rel=1e-9)
    for rows in (found["kernels"], found["kinds"]):
        assert sum(row["ms"] or 0 for row in rows) == pytest.approx(middle, rel=1e-9)
        assert sum(row["teacher_ms"] or 0 for row in rows) == pytest.approx(whole, rel=1e-9)
    layers = {r["name"]: r for r in found["kernels"] if r["full_width"]}
    assert list(layers) == ["stem", "c1", "c2", "head"]  # in execution order
    said = [(r["width"], r["full_width"], r["precision"]) for r in layers.values()]
    assert said == [(32, 32, "fp32"), (16, 40, "int8"), (32, 32, "int8"), (5, 5, "fp32")]
    assert layers["c1"]["ms"] < layers["c1"]["teacher_ms"]


def test_what_another_width_would_change_is_what_is_predicted_for_it(folder: Path) -> None:
    case = Case(folder, MIXED)
    found, now = case.explained(), case.predicted()
    groups = {row["name"]: row for row in found["groups"]}
    assert {n: (r["width"], r["full_width"]) for n, r in groups.items()} == {
        "stem": (32, 32), "c1": (16, 40),
    }  # fmt: skip
    assert groups["stem"]["wider"] is None
    for group, side, width in (
        ("c1", "narrower", 8),
        ("c1", "wider", 24),
        ("stem", "narrower", 24),
    ):
        change = groups[group][side]
        assert change["width"] == width
        other = MIXED | {"prune": {"width": {"c1": 16, group: width}}}
        assert change["change_ms"] == pytest.approx(Case(folder, other).predicted() - now, abs=1e-9)
        assert (change["change_ms"] > 0) == (side == "wider")


def test_where_a_layer_is_slower_in_int8_is_found(folder: Path) -> None:
    found = Case(folder, MIXED).explained()
    layers = {row["name"]: row for row in found["layers"]}
    assert [case["width"] for case in layers["c1"]["widths"]] == [8, 16, 24, 32, 40]
    assert slower_in_int8(layers["c2"]) == "at 16 channels and below"
    fp32 = MIXED | {"quantize": {"precision": {"c2": "int8"}}}
    faster = Case(folder, fp32).predicted() - Case(folder, MIXED).predicted()
    here = layers["c1"]["widths"][1]
    assert here["change_ms"] == pytest.approx(-faster, abs=1e-9)


def test_a_person_reads_it(folder: Path) -> None:
    done = run(*Case(folder, MIXED).words("explain"))
    assert done.exit_code == 0, done.output
    rows = [re.split(r"\s{2,}", line.strip()) for line in done.output.splitlines()]
    (c1,) = [row for row in rows if row[:2] == ["c1", "conv int8"]]
    assert c1[2] == "16/40"
    (group,) = [row for row in rows if row[:2] == ["c1", "16/40"]]
    assert group[2].startswith("8: -")
    assert group[3].startswith("24: +")
    assert "ms predicted" in done.output
    assert "By kind of work" in done.output
    assert "c2: int8 is slower at 16 channels and below; it is int8 at 32" in done.output


def test_of_a_time_that_is_mostly_doubt_the_most_is_told() -> None:
    assert time_of(0.02, 0.005, 3) == "0.020 ±0.010"
    assert time_of(0.02, 0.02, 3) == "<0.060"
    assert time_of(-0.01, 0.01, 3) == "<0.010"
    assert time_of(None, None, 3) == ""


def test_a_block_that_is_dropped_is_gone(folder: Path) -> None:
    found = Case(folder, {"version": 1, "prune": {"drop": ["c1"]}}).explained()
    rows = {row["name"]: row for row in found["kernels"]}
    names = [row["name"] for row in found["kernels"]]
    assert names.index("stem") < names.index("c1") < names.index("c2") < names.index("head")
    for name in ("c1", "c2"):
        assert (rows[name]["ms"], rows[name]["width"]) == (None, None)
        assert rows[name]["teacher_ms"] > 0
    assert [row["name"] for row in found["groups"]] == ["stem"]
    assert [row["name"] for row in found["layers"]] == ["stem", "head"]


def test_another_student_has_kernels_of_its_own(folder: Path) -> None:
    found = Case(folder, {"version": 1, "distill": {"student": "tiny"}}).explained()
    names = Counter(row["name"] for row in found["kernels"])
    assert names["0"] == 1
    assert "c1" not in names
    assert [row["name"] for row in found["kernels"] if row["teacher_ms"] is not None] == [""]
    assert [(row["name"], row["full_width"]) for row in found["groups"]] == [("0", 8)]
    assert found["teacher_predicted_latency_ms"][1] > found["predicted_latency_ms"][1]


def test_what_cannot_be_explained_is_refused_with_what_to_do(folder: Path) -> None:
    case, spec = Case(folder, MIXED), folder / "search.yaml"
    strange = Case(folder, {"version": 1, "prune": {"width": {"c3": 8}}})
    for words, said in (
        (("explain", case.path, "--spec", spec), ["--profile", "flyweight profile --spec"]),
        (case.words("explain")[:-1], ["0" * 16, "--allow-foreign"]),
        (strange.words("explain"), [str(strange.path), "no group 'c3'", "did you mean"]),
        (("explain", spec, *case.words("explain")[2:]), [str(spec), "policy"]),
        (("explain", folder / "none.json", *case.words("explain")[2:]), ["no policy at"]),
        ((*case.words("explain")[:5], spec, "--allow-foreign"), [str(spec), "line 1"]),
    ):
        done = run(*words)
        assert done.exit_code == 2, (words, done.output)
        for text in said:
            assert text in done.output, (words, done.output)
        assert "Traceback" not in done.output


def test_work_that_kills_the_runtime_is_no_choice(folder: Path, tmp_path: Path) -> None:
    head, *networks = (folder / "profile.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in networks]
    for line in lines:
        if any(kind == "conv int8" and "relu" in form for kind, form, *_ in line["work"]):
            line["ms"] = None
    profile = tmp_path / "deadly.jsonl"
    profile.write_text("\n".join([head, *map(json.dumps, lines)]) + "\n")
    rest = ("--spec", folder / "search.yaml", "--profile", profile, "--allow-foreign")
    done = run("explain", Case(folder, MIXED).path, *rest)
    assert done.exit_code == 2
    assert "the runtime died" in done.output
    teacher = Case(folder, {"version": 1}).path
    done = run("explain", teacher, *rest, "--json")
    layers = {row["name"]: row for row in json.loads(done.output)["layers"]}
    assert {case["change_ms"] for case in layers["c1"]["widths"]} == {None}
    assert None not in {case["change_ms"] for case in layers["head"]["widths"]}
    assert run("explain", teacher, *rest).exit_code == 0


@pytest.mark.parametrize(
    ("changes", "group", "words"),
    [
        ([3, 2, -1, -2], "g", "at 16 channels and below"),
        ([-3, -2, -1, 2], "g", "at 32 channels and above"),
        ([3, -2, 2, -1], "g", "at 8, 24 channels"),
        ([3, 3, 3, 3], "g", "at every width"),
        ([0.19, -1, -1, -1], "g", ""),  # within two standard deviations of nothing
        ([3, None, -1, -1], "g", "at 8 channels and below"),  # it cannot run at 16
        ([None, None, None, None], "g", ""),
        ([3], None, "at its 8 channels"),
    ],
)
def test_widths_in_words(changes: list[float | None], group: str | None, words: str) -> None:
    widths = [
        {"width": 8 * (i + 1), "change_ms": c, "deviation_ms": None if c is None else 0.1}
        for i, c in enumerate(changes)
    ]
    assert slower_in_int8({"widths": widths, "group": group}) == words
