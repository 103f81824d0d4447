"""What a trial asks of a node, in Ray's words and in ours."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flyweight.search import placement
from flyweight.search.placement import for_actor, trial_request
from flyweight.search.preflight import facts, lacking
from flyweight.search.spec import Resources, make_spec
from flyweight.spaces import BadInput


def test_a_trial_asks_for_what_the_spec_says() -> None:
    assert trial_request(Resources()) == {"CPU": 1}
    asked = Resources(cpus=2, gpus=0.25, memory_bytes=8_000_000_000, accelerator="A10G")
    assert trial_request(asked) == {
        "CPU": 2, "GPU": 0.25, "memory": 8e9, "accelerator_type:A10G": 0.001,
    }  # fmt: skip
    assert for_actor(asked) == {
        "num_cpus": 2, "num_gpus": 0.25, "memory": 8e9,
        "resources": {"accelerator_type:A10G": 0.001},
    }  # fmt: skip
    assert for_actor(Resources()) == {
        "num_cpus": 1, "num_gpus": 0, "memory": None, "resources": None
    }  # fmt: skip


def test_what_a_node_lacks_is_told_with_both_versions() -> None:
    own = {"Python": "3.11.7", "ray": "2.60.0", "flyweight": "0.1.0"}
    assert lacking(own, own, seen=True) == []
    other = own | {"Python": "3.10.1", "flyweight": "missing"}
    assert lacking(other, own, seen=True) == [
        "Python is 3.10.1, but 3.11.7 on the driver",
        "flyweight is missing, but 0.1.0 on the driver",
    ]
    (unseen,) = lacking(own, own, seen=False)
    assert "what it writes is not seen here" in unseen
    full = own | {"unwritable": "no space left", "problem": "task: no module named x"}
    assert lacking(full, own, seen=False) == [
        "task: no module named x", "it cannot write what a trial makes: no space left"
    ]  # fmt: skip


def test_nodes_of_any_cpu_do_for_a_search_without_int8(tmp_path: Path) -> None:
    values = {"task": "task.py:Net", "objective": {"max_drop": 1}}
    both = make_spec(values, tmp_path, "spec")
    alone = make_spec(values | {"space": {"quantize": {"precisions": ["fp32"]}}}, tmp_path, "spec")
    assert "weights of" in facts(both)["int8"]  # and it is compared
    assert "int8" not in facts(alone)


def test_a_target_node_that_comes_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = [0.0], list[str]()

    def sleep(seconds: float) -> None:
        now[0] += seconds

    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=sleep)
    monkeypatch.setattr(placement, "time", clock)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"target": 1.0} if now[0] > 60 else {})
    asked = SimpleNamespace(remote=lambda: "asked of an autoscaler")
    monkeypatch.setattr(placement, "_alone", lambda _: asked)
    monkeypatch.setattr("ray.cancel", lambda *_, **__: None)
    assert not placement._target_comes(0.0, said.append)
    assert not placement._target_comes(50.0, said.append)
    assert now[0] == 50
    assert placement._target_comes(50.0, said.append)
    assert now[0] < 100
    assert len(said) == 2


def test_a_target_node_that_has_gone_is_not_replaced_without_a_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ray.cluster_resources", dict)
    target = SimpleNamespace(runtime="onnxruntime", threads=1)
    ready: Any = SimpleNamespace(spec=SimpleNamespace(target=target), teacher=b"", request=dict)
    with pytest.raises(BadInput, match="wait for it with --wait"):
        placement.place_of(ready, None, False, print, before="a node")
