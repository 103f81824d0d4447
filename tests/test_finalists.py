"""Finalists that a runtime refuses or dies of: they are left out, and cost no other anything."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flyweight.kernels import Timing
from flyweight.kernels.probe import CHANNELS, probe_model
from flyweight.search import conclusion, meter, pricing
from flyweight.search.conclusion import Conclusion
from flyweight.search.limits import Limits
from flyweight.search.meter import Meter
from flyweight.search.placement import Died, of_finalists
from flyweight.search.record import MemoryRecord
from flyweight.search.run_files import RESULT
from flyweight.search.storage import Storage, write_whole
from flyweight.search.store import artifact_path, write_json
from flyweight.spaces import Impossible, Policy

TEACHER = probe_model("conv", 3)[0].SerializeToString()
OTHER = probe_model("conv", 5)[0].SerializeToString()
FEED = {"input": np.ones((1, CHANNELS, 3, 3), np.float32)}
GOOD, REFUSED, DEADLY = (letter * 64 for letter in "abc")


def test_what_the_runtime_refuses_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "AGAIN", 1)
    other_input = probe_model("linear", 3)[0].SerializeToString()  # it loads, and does not run
    measured = Meter("onnxruntime", 1, TEACHER, FEED)
    found = measured.finalists({"x": b"no model", "good": OTHER, "y": other_input}, 1.0)
    assert found.keys() == {"teacher", "good"}


@pytest.mark.parametrize(("takes_s", "tries"), [(1.0, meter.AGAIN), (25.0, 3), (70.0, 1)])
def test_a_machine_that_is_never_quiet_is_given_about_a_minute(
    takes_s: float, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, teacher_ms = [0.0], iter([9.0, 7.0, 8.0, *range(10, 20)])

    def busy(*_: Any, **__: Any) -> dict[str, Timing]:
        now[0] += takes_s
        return {"teacher": Timing((float(next(teacher_ms)),))}

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(meter, "time_sessions", busy)
    monkeypatch.setattr(meter, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: now[0]))
    found = Meter("onnxruntime", 1, TEACHER, FEED).finalists({}, 1.0)
    assert found["teacher"].median_ms == (9.0 if tries == 1 else 7.0)  # the quietest
    left = len(list(teacher_ms))
    assert 13 - left == tries


def test_the_teacher_is_timed_again_while_something_else_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = iter([Timing((9.0,), waiting=0.3), Timing((7.0,) * 8), Timing((5.0,))])
    monkeypatch.setattr(meter, "time_sessions", lambda *_, **__: {"teacher": next(found)})
    monkeypatch.setattr(meter.time, "sleep", lambda _: None)
    measured = Meter("onnxruntime", 1, TEACHER, FEED)
    assert measured.alone() == measured.teacher_ms == 7.0  # no other try after a quiet one


def test_a_thread_that_waits_for_a_gpu_is_not_disturbed() -> None:
    timings = {"teacher": Timing((7.0,) * 8, waiting=0.9)}
    assert meter.noisy(timings, {"cpu": "c"})
    assert not meter.noisy(timings, {"cpu": "c", "gpu": "g"})
    told = meter.noise(timings, {"cpu": "c"}, Path("run"))
    assert told
    assert "for up to 90% of their time" in told


def test_on_a_slower_day_policies_are_priced_as_the_limits_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pricing, "untrained", lambda *_: b"model")
    now: Any = SimpleNamespace(provisional=lambda _: (1.0, 2.0, 4.0))
    prepared: Any = None
    price = pricing.timed(prepared, now, pace=0.5)(Policy())
    assert price.latency_ms == (0.5, 1.0, 2.0)
    assert price.size_bytes == len(b"model")


def test_a_clock_that_sees_no_call_is_replaced_by_the_wall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter.time, "thread_time_ns", lambda: 0)
    low, middle, high = Meter("onnxruntime", 1, TEACHER, FEED).provisional(OTHER)
    assert 0 < low <= middle <= high


class Target:
    """A place whose runtime refuses what begins with "refused" and dies of what begins with
    "deadly"."""

    device = SimpleNamespace(fingerprint="f", node=None, facts={"cpu": "c"})

    def finalists(self, models: Mapping[str, bytes], _: float) -> dict[str, Timing]:
        if any(model.startswith(b"deadly") for model in models.values()):
            raise Died("what measured was lost")
        taken = [n for n, model in models.items() if not model.startswith(b"refused")]
        return {name: Timing((1.0,)) for name in ("teacher", *taken)}

    @contextlib.contextmanager
    def process(self) -> Iterator[Any]:
        def bears(models: Mapping[str, bytes]) -> dict[str, bytes]:
            return {n: m for n, m in models.items() if not m.startswith(b"deadly")}

        yield SimpleNamespace(bears=bears)


def test_a_process_that_dies_of_one_costs_that_one_alone() -> None:
    models = {GOOD: b"good", DEADLY: b"deadly"}
    found = of_finalists(Target(), models, 1.0)  # type: ignore[arg-type]  # it has what is asked
    assert found
    assert found.keys() == {"teacher", GOOD}


def kept(run_dir: Path, content: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """The full results of artifacts that ``run_dir`` holds, each better than the one before and
    slower."""
    known = []
    for number, (digest, model) in enumerate(content.items()):
        place = run_dir / artifact_path(digest)
        write_whole(place, model)
        write_json(place.with_name("metrics.json"), {"sha256": hashlib.sha256(model).hexdigest()})
        known.append({
            "rung": "full", "digest": digest, "metric": 90.0 + number, "loss": 1.0 - number / 10,
            "latency_ms": [1.0 + number] * 3, "size_bytes": 9, "compressed_bytes": 9,
            "constraint": -1.0, "artifact": artifact_path(digest),
        })  # fmt: skip
    return known


HEADER = {
    "flyweight": "0", "task": "t", "seed": 0, "objective": {"max_drop": 9}, "target": {},
    "predicted_by": "timing", "teacher": {"metric": 93.0, "latency_ms": 1.0},
}  # fmt: skip


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A search whose trials have ended."""
    ready: Any = SimpleNamespace(prepared=SimpleNamespace(splits=SimpleNamespace(test=True)))
    place: Any = Target()
    monkeypatch.setattr(conclusion, "time", SimpleNamespace(time=lambda: 30.0))
    return Conclusion(
        ready, place, tmp_path, MemoryRecord(), Storage(tmp_path), None, [], alone_ms=1.0, since=5.0
    )


def ended(known: list[dict[str, Any]]) -> Any:
    return SimpleNamespace(
        results=lambda _: known, limits=Limits(93.0), trials={}, interrupted=False
    )


def test_a_search_ends_with_what_can_be_measured(
    search: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    unscored = "d" * 64
    content = {GOOD: b"good", REFUSED: b"refused", DEADLY: b"deadly", unscored: b"unscored"}

    def tested(_: Any, model: bytes) -> tuple[float, None]:
        if model == b"unscored":
            raise Impossible("no kernel")
        return 89.0, None

    monkeypatch.setattr(conclusion, "tested", tested)
    found = search.measure(ended(kept(search.run_dir, content)), HEADER)
    assert [row["digest"] for row in found["front"]] == [GOOD]
    assert found["front"][0]["metric_test"] == 89.0
    assert [e["digest"] for e in search.record.entries()] == [GOOD]
    assert found["wall_s"] == 25.0  # of all sessions
    told = "\n".join(search.notes)
    assert len(search.notes) == 3
    assert all(
        f"Finalist {digest[:12]} is left out" in told for digest in content if digest != GOOD
    )


@pytest.mark.parametrize("when", ["fetch", "test"])
def test_ctrl_c_before_finalists_are_timed_leaves_what_is_known(
    search: Any, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    def tested(_: Any, model: bytes) -> tuple[float, None]:
        return (89.0, None) if model == b"good" else interrupted()  # type: ignore[return-value]

    monkeypatch.setattr(conclusion, "tested", tested)
    if when == "fetch":
        search.fetches = True
        monkeypatch.setattr(search, "_fetch", interrupted)
    controller = ended(kept(search.run_dir, {GOOD: b"good", REFUSED: b"better"}))
    found = search.measure(controller, HEADER)
    assert controller.interrupted
    assert [row["digest"] for row in found["front"]] == [GOOD, REFUSED]
    known = 89.0 if when == "test" else None
    assert [row["metric_test"] for row in found["front"]] == [known, None]
    assert [row["latency_spread"] for row in found["front"]] == [None, None]
    assert "are predicted" in " ".join(search.notes)


def test_a_report_that_cannot_be_made_costs_no_result(
    search: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_report(_: Path) -> None:
        raise KeyError("policy")

    monkeypatch.setattr(conclusion, "write_report", write_report)
    found = {"wall_s": 1.0, "best": None, "nearest_miss": None}
    assert search.write(SimpleNamespace(spent_s=lambda: None), found)
    assert json.loads((search.run_dir / RESULT).read_text()) == found
    assert search.notes == [
        "The report could not be made, result.json is whole: KeyError: 'policy'"
    ]
