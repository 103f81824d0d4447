"""search.yaml: what is accepted, and what every refusal names."""

import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from flyweight.search.spec import Spec, load_spec
from flyweight.spaces import BadInput

DESIGN = """
task: task.py:FashionMnist          # file or module, then the name
task_args: {data: embedded}
target: {runtime: onnxruntime, threads: 1, batch_size: 1, profile: null}
objective: {speedup: 2.5, max_drop: 0.5}
space:
  prune: {min_keep: 0.125, multiple_of: 8, criteria: [l1, taylor], reconstruct: [true, false], depth: false}
  quantize: {precisions: [fp32, int8], calibrations: [minmax, percentile, mse], qat: [true, false]}
  distill: {students: [pruned], losses: [kl], temperature: [1, 8], alpha: [0.1, 1.0], learning_rate: [0.001, 0.1]}
search: {strategy: joint, trials: 64, time_budget: 4m, concurrency: 2, seed: 0, sampler: tpe}
rungs: {short: 0.1, full_epochs: 2}
resources: {cpus: 1, gpus: 0, accelerator: null}
storage: null
tracking: {uri: "sqlite:///mlflow.db", experiment: fashion-mnist}
"""  # noqa: E501 (as the design has it)
LEAST: dict[str, Any] = {"task": "task.py:T", "objective": {"max_drop": 1}}


def spec(folder: Path, **changes: Any) -> Spec:
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump(LEAST | changes))
    return load_spec(path)


def test_the_example_of_the_design_is_accepted_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "search.yaml").write_text(DESIGN)
    found = load_spec(tmp_path / "search.yaml")
    assert found.task == f"{tmp_path.resolve()}/task.py:FashionMnist"
    assert (
        found.given_task == pickle.loads(pickle.dumps(found)).given_task == "task.py:FashionMnist"
    )
    assert found.search.time_budget == 240.0
    assert found.tracking is not None
    assert found.tracking.uri == f"sqlite:///{tmp_path.resolve()}/mlflow.db"
    assert found.space.settings().temperature == (1.0, 8.0)


def test_a_spec_written_by_a_search_is_read_back_the_same(tmp_path: Path) -> None:
    (tmp_path / "search.yaml").write_text(DESIGN)
    found = load_spec(tmp_path / "search.yaml")
    other = tmp_path / "run"
    other.mkdir()
    (other / "spec.yaml").write_text(found.to_yaml())
    assert load_spec(other / "spec.yaml").model_dump() == found.model_dump()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objektive": {}}, ["objektive", "did you mean 'objective'"]),
        ({"search": {"trails": 3}}, ["search.trails", "did you mean 'trials'"]),
        ({"space": {"prune": {"min_kep": 1}}}, ["space.prune.min_kep", "'min_keep'"]),
        ({"tracking": {"url": "x"}}, ["tracking.url", "did you mean 'uri'"]),
        ({"space": {"distill": {"alpha": [1, 0.5]}}}, ["alpha: low <= high", "low=1, high=0.5"]),
        ({"space": {"distill": {"alpha": [0, 2]}}}, ["alpha: high <= 1", "2"]),
        ({"space": {"distill": {"temperature": 0}}}, ["temperature", "low >= 0.001"]),
        ({"space": {"quantize": {"precisions": ["int4"]}}}, ["'int4'", "'int8'"]),
        (
            {"space": {"quantize": {"calibrations": ["mxe"]}}},
            ["quantize.calibrations: has 'mxe'"],
        ),
        ({"space": {"distill": {"losses": ["kl", "lk"]}}}, ["space.distill.losses: has 'lk'"]),
        ({"space": {"prune": {"criteria": []}}}, ["space.prune.criteria: must have at least one"]),
        ({"search": {"strategy": "greedy"}}, ["'joint'", "'solver'", "greedy"]),
        ({"search": {"time_budget": "4 fortnights"}}, ["search.time_budget", "90s, 4m or 1h"]),
        ({"search": {"time_budget": "0s"}}, ["time_budget > 0 must hold (got '0s')"]),
        ({"search": {"time_budget": "1.2.3s"}}, ["search.time_budget"]),
        ({"search": {"trials": 0}}, ["search.trials: trials >= 1 must hold (got 0)"]),
        ({"search": {"trials": 1.5}}, ["search.trials: must be a whole number (got 1.5)"]),
        ({"search": {"sampler": "cma"}}, ["search.sampler: must be 'tpe' or 'random' (got 'cma')"]),
        ({"space": {"prune": {"depth": "deep"}}}, ["must be true or false (got 'deep')"]),
        ({"space": {"prune": {"sparsity": [0, 2]}}}, ["sparsity <= 0.95 must hold (got 2)"]),
        ({"space": {"quantize": {"qat": []}}}, ["must have at least one"]),
        ({"task": 3}, ["task: must be text (got 3)"]),
        ({"resources": {"cpus": "many"}}, ["resources.cpus: must be a number (got 'many')"]),
        ({"target": {"runtime": "onnxruntim"}}, ["did you mean 'onnxruntime'"]),
        ({"target": {"profile": 3}}, ["target.profile", "3"]),
        ({"objective": {"speedup": 2, "latency_ms": 3}}, ["not both"]),
        ({"objective": {}}, ["at least one of"]),
        ({"objective": {"speedup": float("inf")}}, ["objective.speedup: must be a finite number"]),
        ({"objective": {"max_drop": float("nan")}}, ["objective.max_drop"]),
        ({"objective": {"speedup": 0}}, ["objective.speedup: speedup > 0 must hold (got 0)"]),
        ({"objective": {"compressed_bytes": 0}}, ["compressed_bytes > 0 must hold (got 0)"]),
        ({"rungs": {"short": 1}}, ["rungs.short: short < 1 must hold (got 1)"]),
        ({"space": 3}, ["space: must be keys with values (got 3)"]),
        ({"folder": "/"}, ["folder"]),
        ({3: 4}, ["search.yaml"]),
    ],
)
def test_a_refusal_names_the_key_the_rule_and_the_value(
    tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    path = tmp_path / "search.yaml"
    path.write_text(yaml.safe_dump(LEAST | changes))
    with pytest.raises(BadInput) as caught:
        load_spec(path)
    for word in words:
        assert word in str(caught.value)


def test_what_is_wrong_is_told_before_torch_is_imported(tmp_path: Path) -> None:
    """Which takes seconds: that a spec is not there, is not YAML, has a wrong key or value."""
    code = """
import sys
from flyweight.search.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    print(end.code, sorted({"torch", "ray", "mlflow", "sklearn", "matplotlib"} & set(sys.modules)))
"""
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(LEAST | {"search": {"trials": 0}}))
    for words in (["search", "bad.yaml"], ["plan", "none.yaml"], ["sample", "-n1", "--spec", "."]):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        assert done.stdout == "2 []\n", done.stderr


@pytest.mark.parametrize("content", ["", "- a", "a: [", "\t", b"\xff\xfe\x00"])
def test_what_is_not_a_spec(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "search.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput, match=r"search\.yaml"):
        load_spec(path)


def test_no_spec_and_no_task(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="flyweight init"):
        load_spec(tmp_path / "none.yaml")
    (tmp_path / "task.py").write_text("class T: pass")
    with pytest.raises(BadInput, match=r"task\.py is Python, but a search\.yaml is expected"):
        load_spec(tmp_path / "task.py")
    (tmp_path / "search.yaml").write_text("objective: {max_drop: 1}")
    with pytest.raises(BadInput, match="task"):
        load_spec(tmp_path / "search.yaml")


@pytest.mark.parametrize(
    ("given", "seconds"),
    [("90s", 90), ("1.5m", 90), ("1h", 3600), ("2d", 172800), (7, 7), (" 4 m ", 240)],
)  # fmt: skip
def test_durations(tmp_path: Path, given: Any, seconds: float) -> None:
    assert spec(tmp_path, search={"time_budget": given}).search.time_budget == seconds


def test_relative_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    found = spec(tmp_path, storage="../kept", task="package.module:T")
    assert found.storage == str(tmp_path.resolve().parent / "kept")
    assert found.task == "package.module:T"
    assert spec(tmp_path, storage="s3://bucket/x").storage == "s3://bucket/x"
    uri = "sqlite:////tmp/absolute.db"
    tracking = spec(tmp_path, tracking={"uri": uri}).tracking
    assert tracking is not None
    assert tracking.uri == uri
    assert spec(tmp_path, tracking=None).tracking is None


@pytest.mark.parametrize(
    ("uri", "absolute"),
    [
        ("sqlite:///x.db", "sqlite:///{}/x.db"),
        ("sqlite+pysqlite:///../x.db", "sqlite+pysqlite:///{}/x.db"),
        ("mlruns", "{}/mlruns"),
        ("./mlruns", "{}/mlruns"),
        ("file:mlruns", "file:{}/mlruns"),
        ("file:./mlruns", "file:{}/mlruns"),
        *((uri, uri) for uri in (
            "sqlite:////x.db", "sqlite:///:memory:", "sqlite://", "/x/mlruns", "file:/x/mlruns",
            "file:///x/mlruns", "http://host:5000", "databricks", "databricks://who", "uc",
            "postgresql://host/db",
        )),
    ],
)  # fmt: skip
def test_a_search_runs_elsewhere_so_that_no_address_of_a_tracker_stays_relative(
    tmp_path: Path, uri: str, absolute: str
) -> None:
    tracking = spec(tmp_path, tracking={"uri": uri}).tracking
    assert tracking is not None
    folder = tmp_path.resolve()
    assert tracking.uri == absolute.format(folder.parent if "../" in uri else folder)


def test_a_seed_is_what_samplers_take(tmp_path: Path) -> None:
    assert spec(tmp_path, search={"seed": 2**32 - 1}).search.seed == 2**32 - 1
    with pytest.raises(BadInput, match=r"search\.seed: seed < 4294967296 must hold"):
        spec(tmp_path, search={"seed": 2**32})


def test_one_number_is_a_range_of_one(tmp_path: Path) -> None:
    assert spec(tmp_path, space={"distill": {"alpha": 0.5}}).space.distill.alpha == (0.5, 0.5)


def test_secrets_are_not_written(tmp_path: Path) -> None:
    found = spec(
        tmp_path, tracking={"uri": "https://me:hunter2@host/x"}, storage="s3://key:hunter2@bucket/x"
    )
    assert "hunter2" not in found.to_yaml()


def test_the_starter_names_every_key(root: Path) -> None:
    text = (root / "search" / "templates" / "search.yaml.txt").read_text()

    def names(section: Any) -> Iterator[str]:
        for name, field in section.model_fields.items():
            if not field.exclude:
                yield name
            kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
            for kind in kinds:
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    yield from names(kind)

    missing = [n for n in names(Spec) if not re.search(rf"\b{n}:", text)]
    assert missing == []
