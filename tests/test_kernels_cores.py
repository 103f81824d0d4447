"""What a container gives counts, not what the machine has."""

import os
from pathlib import Path

import pytest

from flyweight.kernels import cores as file
from flyweight.kernels import make_runtime
from flyweight.search.local_ray import started
from flyweight.spaces import BadInput


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of cgroups of a machine of 64 CPUs, of which this process may run on 16."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(file, "ALLOWED", file._allowed())
    monkeypatch.setattr(file, "GROUPS", tmp_path)
    monkeypatch.setattr(file, "CGROUP", tmp_path / "own")
    (tmp_path / "own").write_text("1:cpu:/v1\n0::/pod/container\n")
    (tmp_path / "pod" / "container").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("quotas", "expected"),
    [
        ({}, 16),
        ({"pod/container": "400000 100000"}, 4),
        ({"pod/container": "max 100000", "pod": "250000 100000"}, 2),  # two at a time, not three
        ({".": "50000 100000"}, 1),
        ({"pod": "9900000 100000"}, 16),
        ({"pod": ""}, 16),
    ],
)
def test_a_cpuset_and_quotas(groups: Path, quotas: dict[str, str], expected: int) -> None:
    for group, quota in quotas.items():
        (groups / group / "cpu.max").write_text(f"{quota}\n")
    assert file.cores() == expected


def test_where_nothing_is_told_all_count(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(file, "ALLOWED", file._allowed())
    (groups / "own").unlink()
    assert file.cores() == 64


@pytest.mark.usefixtures("groups")
def test_runtimes_and_ray_go_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="threads=17, cores=16"):
        make_runtime("onnxruntime", 17)
    asked = []
    monkeypatch.setattr("ray.init", lambda **options: asked.append(options["num_cpus"]))
    monkeypatch.setattr("ray.shutdown", lambda: None)
    for cpus in (2, 20):  # trials may ask for more than there are
        with started(cpus, None):
            pass
    assert asked == [16, 20]
