"""Device profiles in a search: which are taken, kept and gone on with, on devices made up."""

import contextlib
import errno
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from flyweight.kernels import DeviceProfile, Signature, Timed, Timing, signature
from flyweight.search import conclusion, driver, predict, profiling
from flyweight.search.cache import cache_folder
from flyweight.search.cli import main
from flyweight.search.driver import search
from flyweight.search.meter import Device, Meter
from flyweight.search.preparation import Preparation
from flyweight.search.profiling import (
    check_device,
    empty_profile,
    make_profile,
    mixed_policies,
    writing,
)
from flyweight.search.ready import Ready, ready
from flyweight.search.record import MemoryRecord
from flyweight.search.run_files import PROFILE
from flyweight.search.spec import load_spec
from flyweight.search.storage import Storage
from flyweight.spaces import BadInput, Policy

TASK = """
import torch
from torch import nn
from flyweight.compressors import ClassificationTask


class Patterns(ClassificationTask):
    def __init__(self, student=8):
        torch.manual_seed(0)
        self.train = self.val = [(torch.randn(3, 8, 8), i % 5) for i in range(60)]
        self.student = student

    def model(self):
        return nn.Sequential(
            nn.Conv2d(3, 64, 3, 2), nn.ReLU(), nn.Conv2d(64, 48, 3), nn.ReLU(), nn.Flatten(),
            nn.Linear(48, 5),
        )

    def students(self):
        return {"tiny": nn.Sequential(
            nn.Conv2d(3, self.student, 3, 2), nn.Flatten(), nn.Linear(9 * self.student, 5)
        )}
"""
SPEC = """
task: task.py:Patterns
objective: {max_drop: 60}
space:
  prune: {multiple_of: 8}
  distill: {students: [pruned, tiny]}
search: {trials: 15}
rungs: {full_epochs: 0.5}
tracking: null
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task and its search.yaml; the cache of the tests beside them."""
    monkeypatch.setenv("FLYWEIGHT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "search.yaml").write_text(SPEC)
    return tmp_path


def prepared(folder: Path, **changes: Any) -> Ready:
    """changes: of the spec's target, task_args or space.quantize."""
    spec = load_spec(folder / "search.yaml")
    sections = {
        "target": spec.target.model_copy(update=changes.get("target", {})),
        "task_args": changes.get("task_args", {}),
        "space": spec.space.model_copy(
            update={"quantize": spec.space.quantize.model_copy(update=changes.get("quantize", {}))}
        ),
    }
    return ready(spec.model_copy(update=sections))


def facts(count: int, ready: Ready, **changes: Any) -> DeviceProfile:
    """A profile of ``count`` networks of a space, by their nominal times."""
    found = replace(empty_profile(ready.spec, ready.prepared), **changes)
    known: set[Any] = set()
    for number, policy in enumerate(islice(mixed_policies(ready.space, 0), 2000)):
        counts = signature(ready.prepared.plan(policy))
        if (key := frozenset(counts.items())) not in known:
            known.add(key)
            found.timed.append(Timed(counts, took(counts), 0.5, number % 4, policy.digest))
        if len(known) == count:
            return found
    raise AssertionError("the space has no more")


def took(counts: Mapping[Signature, int]) -> float:
    return 5 * sum(n * s.nominal_ms for s, n in counts.items())


class Bench:
    """A device on which every network takes the same, and no time."""

    def __init__(self, ready: Ready) -> None:
        self.device = Device.of(ready.prepared.runtime)
        self.timed = 0

    @contextlib.contextmanager
    def process(self) -> Iterator[Any]:
        def time(models: Mapping[str, bytes]) -> dict[str, Timing | None]:
            self.timed += len(models)
            return {name: Timing((1.0, 1.0)) for name in ("teacher", *models)}

        yield SimpleNamespace(time=time)


def preparation(ready: Ready, run: Path) -> tuple[Preparation, Bench]:
    bench: Any = Bench(ready)
    run.mkdir(exist_ok=True)
    return Preparation(ready, bench, run, None), bench


# -- which device's ------------------------------------------------------------------------------


def test_int8_is_made_for_the_kernels_of_a_carried_profile(folder: Path) -> None:
    """The cluster's machines bear eight bits, the device seven, or the other way round."""
    found = prepared(folder)
    bits = found.prepared.runtime.capabilities.weight_bits
    other = facts(1, found, fingerprint="0" * 16, weight_bits=15 - bits)
    with pytest.raises(BadInput, match=f"int8 weights of {15 - bits} bits, this machine .* {bits}"):
        check_device(other, found, local=False)
    check_device(replace(other, weight_bits=bits), found, local=False)
    check_device(other, prepared(folder, quantize={"precisions": ["fp32"]}), local=False)


def test_one_machine_refuses_the_profile_of_another_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, found = folder / "carried.jsonl", prepared(folder)
    facts(30, found, fingerprint="0" * 16).create(path)
    target = found.spec.target.model_copy(update={"profile": str(path)})

    def never(*_: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(driver, "connected", never)
    with pytest.raises(BadInput, match=f"device {'0' * 16} .*; make one on the target"):
        search(found.spec.model_copy(update={"target": target}), folder / "run")
    assert not (folder / "run").exists()


def test_a_foreign_profile_is_scaled_by_the_teacher_as_it_is_here(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the teacher takes 0.5 ms, here (so it is said, in place of timing it) 50 ms."""
    monkeypatch.setattr(Meter, "alone", lambda _: 50.0)
    found = prepared(folder)
    carried = facts(60, found, fingerprint="0" * 16)
    plan = [found.prepared.plan(Policy())]

    def ends(profile: DeviceProfile, **how: Any) -> Any:
        return predict.predictor_of(found.spec, found.prepared, profile, **how).predict(plan)[0]

    _, middle, high = ends(carried, allow_foreign=True)
    there = ends(carried, fingerprint="0" * 16, teacher_ms=0.5)
    assert middle == pytest.approx(100 * there[1], rel=1e-6)
    assert high - middle == pytest.approx(300 * (there[2] - there[1]), rel=1e-6)  # and wider
    with pytest.raises(BadInput, match="make one on the target"):
        ends(carried)


# -- made for a search, and kept for the next ----------------------------------------------------


def test_a_profile_that_a_run_has_prices_it_whatever_its_strategy(folder: Path) -> None:
    run, found = folder / "run", prepared(folder)
    plain = found.spec.search.model_copy(update={"strategy": "random"})
    random = replace(found, spec=found.spec.model_copy(update={"search": plain}))
    other, bench = preparation(random, run)
    assert other.found(0.1, nothing_left=False) is None  # a short search makes none
    made = preparation(found, run)[0].profile(0.1)
    assert made
    assert other.found(0.1, nothing_left=False) == made
    assert (bench.timed, other.notes) == (0, [])


def test_what_a_resumed_search_finds_out_takes_a_share_of_the_time_that_is_left(
    folder: Path,
) -> None:
    found = prepared(folder)
    search = found.spec.search.model_copy(update={"time_budget": 100.0})
    found = replace(found, spec=found.spec.model_copy(update={"search": search}))
    for spent, said in ((99.0, 1), (0.0, 0)):
        made, _ = preparation(found, folder / "run")
        made.spent_s = spent
        made.profile(10.0)
        assert sum("takes longer than the 0 s" in note for note in made.notes) == said


def test_a_search_that_goes_on_with_another_batch_size_has_a_profile_of_that(folder: Path) -> None:
    run = folder / "run"
    first, _ = preparation(prepared(folder), run)
    made = first.profile(0.1)
    assert made
    kept = {p.name: p.read_bytes() for p in (folder / "cache").iterdir()}
    assert len(kept) == 1
    eight, bench = preparation(prepared(folder, target={"batch_size": 8}), run)
    other = eight.profile(0.1)
    assert not eight.notes
    assert other
    assert other.request == {"input": (8, 3, 8, 8)}
    assert bench.timed == len(other.timed)
    now = {p.name: DeviceProfile.load(p) for p in (folder / "cache").iterdir()}
    assert {n: p.request["input"][0] for n, p in now.items()} == {
        name: 1 if name in kept else 8 for name in now
    }
    aside = [p for p in run.iterdir() if p.name != PROFILE]
    assert [DeviceProfile.load(p) for p in aside] == [made]
    # And back again: from the cache, nothing is timed anew.
    back, bench = preparation(prepared(folder), run)
    assert back.profile(0.1) == made
    assert bench.timed == 0


def test_no_time_is_spent_on_a_profile_that_cannot_be_had(folder: Path) -> None:
    slow, bench = preparation(prepared(folder), folder / "run")
    assert slow.profile(2000.0) is None
    assert bench.timed == 0
    (note,) = slow.notes
    assert "networks of a model of 2000 ms takes longer than the 300 s" in note
    made, _ = preparation(prepared(folder), folder / "run")
    assert made.profile(0.1)
    known, bench = preparation(prepared(folder), folder / "run")
    assert known.profile(2000.0)  # what is known costs nothing
    assert bench.timed == 0


@pytest.mark.parametrize("content", ["no profile\n", "of another batch size"])
def test_a_profile_that_is_none_costs_neither_the_run_nor_the_cache(
    content: str, folder: Path
) -> None:
    run, found = folder / "run", prepared(folder)
    wrong = facts(60, prepared(folder, target={"batch_size": 8}))
    first, _ = preparation(found, run)
    made = first.profile(0.1)
    (kept,) = (folder / "cache").iterdir()
    for path in (kept, run / PROFILE):
        if "\n" in content:
            path.write_text(1000 * content)  # larger than what is right
        else:
            wrong.create(path)
    again, _ = preparation(found, run)
    assert again.profile(0.1) == made
    assert not again.notes
    assert DeviceProfile.load(kept) == made


def test_a_smaller_profile_does_not_take_the_place_of_a_larger_one(folder: Path) -> None:
    first, _ = preparation(prepared(folder), folder / "one")
    made = first.profile(0.1)
    assert made
    (kept,) = (folder / "cache").iterdir()
    fewer = replace(made, timed=[replace(t, policy=99 * "a") for t in made.timed[:-1]])
    fewer.create(folder / "one" / PROFILE)
    assert (folder / "one" / PROFILE).stat().st_size > kept.stat().st_size
    first.keep()
    assert DeviceProfile.load(kept) == made


def test_finalists_that_are_fed_back_are_there_for_the_next_search(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, run = prepared(folder), folder / "run"
    first, _ = preparation(found, run)
    made = first.profile(0.1)
    assert made
    policy = next(
        p
        for p in mixed_policies(found.space, 7)
        if frozenset(signature(found.prepared.plan(p)).items())
        not in {frozenset(t.counts.items()) for t in made.timed}
    )
    searched: Any = object.__new__(driver._Search)
    searched.ready, searched.run_dir, searched.profile = found, run, made
    searched.spec, searched.preparation, searched.notes = found.spec, first, []
    searched.place = first.place
    searched.record, searched.storage, searched.mirror = MemoryRecord(), Storage(run), None
    searched.console = searched.predictor = None
    searched.began = searched.earlier_s = searched.alone_ms = 0.0
    searched._name_profile()
    controller = SimpleNamespace(trials={0: SimpleNamespace(policy=policy)})
    timings = {"teacher": Timing((1.0, 1.0)), policy.digest: Timing((0.7, 0.7))}
    searched._conclusion()._feed_back(controller, timings)
    assert not searched.notes
    again, _ = preparation(found, folder / "next")
    profile = again.profile(0.1)
    assert profile
    assert policy.digest in {t.policy for t in profile.timed}
    # A profile that the spec names is its user's alone.
    path = folder / "own.jsonl"
    replace(made, timed=made.timed[:1]).create(path)
    target = found.spec.target.model_copy(update={"profile": str(path)})
    searched.spec = found.spec.model_copy(update={"target": target})
    (kept,) = cache_folder(found.spec).iterdir()
    before = kept.read_bytes()
    monkeypatch.setattr(conclusion, "FEED_S", 0.3)
    with writing(path):  # `flyweight profile` goes on with it
        searched._conclusion()._feed_back(controller, timings)
    assert len(DeviceProfile.load(path).timed) == 1
    assert "is writing" in searched.notes.pop()
    searched._conclusion()._feed_back(controller, timings)
    assert len(DeviceProfile.load(path).timed) == 2
    assert not searched.notes
    assert kept.read_bytes() == before


def test_another_student_is_another_space(folder: Path) -> None:
    """Its networks are not in the profile of the space with the student of before."""
    first, _ = preparation(prepared(folder), folder / "one")
    assert first.profile(0.1)
    other = prepared(folder, task_args={"student": 16})
    second, bench = preparation(other, folder / "two")
    made = second.profile(0.1)
    assert made
    assert bench.timed == len(made.timed)
    assert len(list((folder / "cache").iterdir())) == 2


# -- when it is good enough ----------------------------------------------------------------------


def test_a_profile_is_not_judged_by_the_networks_that_it_is_made_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun with seed 0, gone on with seed 1."""
    found, judged = prepared(folder), list[frozenset[Any]]()
    real = profiling.LatencyPredictor

    class Watched(real):  # type: ignore[misc,valid-type]
        def predict_work(self, sums: Any) -> Any:
            judged.extend(frozenset(counts.items()) for counts in sums)
            return np.tile([1.0, 2.0, 3.0], (len(sums), 1))

        def predict(self, plans: Any) -> Any:
            return self.predict_work([signature(plan) for plan in plans])

    monkeypatch.setattr(profiling, "LatencyPredictor", Watched)
    path, bench = folder / "p.jsonl", Bench(found)
    made = facts(100, found)
    made.create(path)
    make_profile(found, path, place=bench, networks=101, seed=1)
    assert judged
    assert not {*judged} & {frozenset(t.counts.items()) for t in made.timed}


def test_networks_that_the_runtime_died_of_do_not_end_a_profile(folder: Path) -> None:
    """They say nothing of how wide intervals are, however many they are."""
    found, path = prepared(folder), folder / "p.jsonl"
    made = facts(80, found)
    made.timed = [t if i < 10 else replace(t, ms=None) for i, t in enumerate(made.timed)]
    made.create(path)
    place = Bench(found)
    again = make_profile(found, path, place=place, networks=100, say=lambda _: None)
    assert len(again.timed) == 100
    assert place.timed == 20


def test_a_prediction_on_a_busy_machine_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def quietest(*_: Any) -> dict[str, Timing]:
        return {"teacher": Timing((1.0, 2.0, 1.5, 1.0, 2.0), waiting)}

    monkeypatch.setattr(Meter, "_quietest", quietest)
    found = prepared(folder)
    profile = facts(60, found)
    for waiting in (0.4, 0.0):
        caplog.clear()
        predict.predictor_of(found.spec, found.prepared, profile)
        (said,) = caplog.messages
        assert "the rounds of the teacher spread by 67%" in said
        assert f"for up to {waiting:.0%} of their time" in said
    monkeypatch.setattr(Meter, "_quietest", lambda *_: {"teacher": Timing((1.0, 1.0))})
    caplog.clear()
    predict.predictor_of(found.spec, found.prepared, profile)
    assert not caplog.messages


def test_a_profile_of_too_few_networks_is_not_praised(folder: Path) -> None:
    out, spec = folder / "p.jsonl", folder / "search.yaml"
    words = ["profile", "--spec", str(spec), "-o", str(out), "--networks"]
    done = CliRunner().invoke(main, [*words, "2"])
    assert done.exit_code == 0, done.output
    assert "target: {profile" not in done.stdout
    assert "at least 20 timed networks, but this one has 2" in done.stdout
    assert "times its policies by itself" in done.stdout
    facts(25, prepared(folder)).create(out)
    done = CliRunner().invoke(main, [*words, "25"])
    assert done.exit_code == 0, done.output
    assert f"target: {{profile: {out}}}" in done.stdout
    assert json.loads(out.read_text().splitlines()[0])["weight_bits"] in (7, 8)


@pytest.mark.parametrize("locks", [True, False])
def test_two_do_not_profile_into_one_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    words = ["profile", "--spec", str(folder / "search.yaml"), "-o", str(folder / "p.jsonl")]
    begun: list[str] = []

    def begins(_: Any) -> Ready:
        begun.append("first" if not begun else "second")
        if begun == ["first"]:
            second = CliRunner().invoke(main, words)
            begun.append(second.output)
        raise BadInput("that is all")

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(predict, "ready", begins)
    if not locks:
        monkeypatch.setattr("fcntl.flock", no_locks)
    CliRunner().invoke(main, words)
    if locks:
        assert begun == [
            "first",
            f"flyweight: another process is writing {folder / 'p.jsonl'} (`flyweight profile`, or "
            "a search that ends); wait for it, or name another file\n",
        ]
    else:  # a network drive: they are not told of each other
        assert begun[1] == "second"
    assert "that is all" in CliRunner().invoke(main, words).output  # when it has ended
    assert sorted(place.name for place in folder.iterdir()) == ["search.yaml", "task.py"]
