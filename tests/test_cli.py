"""The command line: help, exit codes, the cheap commands."""

import json
import random
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from flyweight.search.cli import main
from flyweight.search.plan import space_of
from flyweight.search.spec import load_spec, spec_file
from flyweight.search.store import policy_file
from flyweight.spaces import BadInput, Policy


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(w) for w in words])


@pytest.mark.parametrize("name", [None, *sorted(main.commands)])
def test_help(name: str | None) -> None:
    for flag in ("-h", "--help"):
        found = run(*([name] if name else []), flag)
        assert found.exit_code == 0
        assert "Usage:" in found.output


def test_the_commands_of_the_design_that_are_built() -> None:
    assert {"init", "plan", "search", "sample", "replay", "report", "deploy", "serve", "rollback",
            "submit", "status", "logs", "stop", "profile", "predict",
            "explain", "measure", "deliver"} >= set(main.commands) >= {
        "init", "plan", "search", "sample", "replay", "report", "deploy", "profile", "predict",
        "explain", "measure",
    }  # fmt: skip
    assert "0." in run("--version").output


def test_init_needs_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    found = run("init", tmp_path / "file")
    assert found.exit_code == 2
    assert "choose another" in found.output + found.stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_init_writes_a_starter_once(tmp_path: Path) -> None:
    assert run("init", tmp_path / "new" / "s").exit_code == 0
    assert sorted(p.name for p in (tmp_path / "new" / "s").iterdir()) == ["search.yaml", "task.py"]
    (tmp_path / "new" / "s" / "task.py").write_text("mine")
    (tmp_path / "new" / "s" / "search.yaml").unlink()
    again = run("init", tmp_path / "new" / "s")
    assert again.exit_code == 2
    assert "exists" in again.output
    assert (tmp_path / "new" / "s" / "task.py").read_text() == "mine"


def test_bad_input_is_one_line_and_code_2(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("task: t.py:T\nobjective: {max_drop: 1}\ntrials: 3\n")
    missing = tmp_path / "missing.yaml"
    for words in (
        ("plan", missing), ("search", missing), ("search", bad), ("plan", bad),
        ("sample", "--spec", missing, "-n", 1), ("sample", "--spec", bad, "-n", 0),
        ("replay", tmp_path / "p.json", "--spec", bad), ("report", tmp_path), ("deploy", tmp_path),
        ("explain", tmp_path / "p.json", "--spec", bad), ("explain", bad),
        ("serch",), ("search",),
    ):  # fmt: skip
        found = run(*words)
        assert found.exit_code == 2, (words, found.output)
        assert "Traceback" not in found.output


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--help",), 0), (("search", "--serch"), 2), (("search", "missing.yaml"), 2),
        (("plan", "broken.yaml"), 2), (("search", "unknown.yaml"), 2), (("report", "missing"), 2),
        (("predict", "p.json", "--spec", "unknown.yaml"), 2), (("serve", "missing"), 2),
        (("rollback", "digits", "--tracking-uri", "sqlite:///missing.db"), 2),
    ],
)  # fmt: skip
def test_what_needs_no_torch_does_not_wait_for_it(
    words: tuple[str, ...], code: int, tmp_path: Path
) -> None:
    (tmp_path / "broken.yaml").write_text("task: [")
    (tmp_path / "unknown.yaml").write_text(
        "task: t.py:T\nobjective: {max_drop: 1}\nserch: {trials: 3}\n"
    )
    slow = {"torch", "ray", "mlflow", "scipy", "onnx", "onnxruntime"}
    script = f"""
import atexit, sys
from flyweight.search.cli import main
atexit.register(lambda: print("imported", sorted({slow} & sys.modules.keys())))
main({list(words)})
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines()[-1] == "imported []"


@pytest.mark.parametrize("command", ["report", "deploy", "deliver", "measure"])
def test_a_run_that_is_not_there_is_one_line_with_what_to_give(
    command: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for place, what in ((tmp_path / "no", "is not there"), (tmp_path / "file", "is no folder")):
        found = run(command, place)
        assert found.exit_code == 2
        (line,) = found.output.splitlines()
        assert line.startswith(f"flyweight: RUN_DIR {place} {what}; give the folder of a search")


@pytest.mark.parametrize("command", ["deploy", "report", "measure"])
def test_an_artifact_in_place_of_its_run_is_told_what_to_name(command: str, tmp_path: Path) -> None:
    place = tmp_path / "run" / "artifacts" / ("ab" * 32)
    place.mkdir(parents=True)
    (place / "policy.json").write_text("{}")
    found = run(command, place)
    assert found.exit_code == 2
    rest = f" --digest {'ab' * 6}" if command == "deploy" else ""
    (line,) = found.output.splitlines()
    assert line.endswith(f"is one artifact of a run; name the run: {tmp_path / 'run'}{rest}")


def test_a_spec_may_be_named_by_its_folder(tmp_path: Path) -> None:
    text = "task: task.py:T\nobjective: {max_drop: 1}\n"
    for name in ("spec.yaml", "search.yaml"):  # of a run; of what one writes, which goes first
        (tmp_path / name).write_text(text)
        assert spec_file(tmp_path) == tmp_path / name
        assert load_spec(tmp_path).task == f"{tmp_path / 'task.py'}:T"
    for words in (("plan", tmp_path), ("sample", "--spec", tmp_path, "-n", 1)):
        found = run(*words)
        assert found.exit_code == 2
        assert f"task: no file {tmp_path / 'task.py'}" in found.output
    (tmp_path / "empty").mkdir()
    found = run("search", tmp_path / "empty")
    assert found.exit_code == 2
    assert "empty is a folder without a search.yaml or, of a run, a spec.yaml" in found.output


def test_a_policy_may_be_named_by_its_artifact(tmp_path: Path) -> None:
    files = {}
    for digest in ("ab12" * 16, "ab34" * 16):
        files[digest] = tmp_path / "artifacts" / digest / "policy.json"
        files[digest].parent.mkdir(parents=True)
        files[digest].write_text("{}")
    first, second = files.values()
    assert policy_file(first, tmp_path) == first
    assert policy_file(first.parent, tmp_path) == first
    assert policy_file(Path("ab3"), tmp_path) == second
    assert policy_file(Path("cd"), tmp_path) == Path("cd")  # told where it is read
    with pytest.raises(BadInput, match=r"several artifacts of .* begin with ab: ab12ab12"):
        policy_file(Path("ab"), tmp_path)
    (tmp_path / "task.py").write_text("")
    (tmp_path / "spec.yaml").write_text("task: task.py:T\nobjective: {max_drop: 1}\n")
    for words in (("explain", "ab3"), ("replay", second.parent), ("predict", "ab3")):
        more = ("--profile", tmp_path / "none") if words[0] == "predict" else ()
        found = run(*words, "--spec", tmp_path, *more)
        assert found.exit_code == 2
        assert "no policy at" not in found.output
    assert "no policy at cd" in run("explain", "cd", "--spec", tmp_path).output


def test_a_rollback_makes_no_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for uri in ("sqlite:///mlflow.db", f"sqlite:///{tmp_path}/mlflow.db"):
        found = run("rollback", "digits", "--tracking-uri", uri)
        assert found.exit_code == 2
        assert f"there is no MLflow database {tmp_path / 'mlflow.db'}" in found.output
    assert not list(tmp_path.iterdir())


def test_a_task_that_cannot_be_loaded(tmp_path: Path) -> None:
    spec = tmp_path / "search.yaml"
    spec.write_text("task: task.py:T\nobjective: {max_drop: 1}\n")
    assert run("plan", spec).exit_code == 2
    (tmp_path / "task.py").write_text("class Other: pass\n")
    found = run("plan", spec)
    assert found.exit_code == 2
    assert "T" in found.output


@pytest.mark.slow
def test_sample_writes_numbered_legal_policies(tmp_path: Path) -> None:
    assert run("init", tmp_path / "s").exit_code == 0
    spec, out = tmp_path / "s" / "search.yaml", tmp_path / "out"
    assert run("sample", "--spec", spec, "-n", 11, "--seed", 3, "-o", out).exit_code == 0
    names = sorted(p.name for p in out.iterdir())
    assert names == [f"policy-{n:02d}.json" for n in range(11)]
    space, rng = space_of(spec), random.Random(3)
    found = [Policy.from_json((out / name).read_text()) for name in names]
    assert all(space.contains(p) for p in found)
    assert found == [space.sample(rng) for _ in range(11)]
    lines = run("sample", "--spec", spec, "-n", 11, "--seed", 3).output.splitlines()
    assert [Policy.from_dict(json.loads(line)) for line in lines] == found


def test_ctrl_c_while_arguments_are_read_is_told_as_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a spec imports torch, which takes seconds: long enough to press it."""

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flyweight.search.spec.load_spec", interrupted)
    found = run("search", tmp_path / "search.yaml")
    assert found.exit_code == 130
    assert "a search that has begun goes on with --resume" in found.output
    assert "Aborted" not in found.output


def test_ctrl_c_while_the_command_line_is_imported_is_quiet(root: Path, tmp_path: Path) -> None:
    scripts = tomllib.loads((root / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["flyweight"].partition(":")
    (tmp_path / "click.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from {module} import {function}"
    done = subprocess.run(
        [sys.executable, "-c", f"{script}; sys.exit({function}())", "--help"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def commands(page: str) -> list[str]:
    """The calls of flyweight in its shell blocks, fenced or indented."""
    blocks = "".join(re.findall(r"^```bash.*?\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    blocks += "\n".join(re.findall(r"^    (?:\.venv/bin/)(.*)$", page, re.MULTILINE))
    return re.findall(r"^flyweight (.*?)(?: +#.*)?$", blocks, re.MULTILINE)


def test_every_command_of_the_pages_is_one_that_the_command_line_takes(root: Path) -> None:
    """Those of two pages are run as they stand (tests/test_docs.py); the rest must at least parse:
    no command, option or argument is named that is not there."""
    seen = set()
    for page in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        for line in commands(page.read_text()):
            name, *words = shlex.split(line)
            assert name in main.commands, f"{page.name}: {line}"
            seen.add(name)
            command = main.commands[name]
            try:
                _, left, _ = command.make_parser(click.Context(command)).parse_args(words)
            except click.UsageError as error:
                raise AssertionError(f"{page.name}: {line}: {error.message}") from error
            assert not left, f"{page.name}: {line}: too many words, {left}"
    assert len(seen) >= 14


@pytest.mark.parametrize("wait", ["20", "1.2.3m", "."])
def test_a_wait_that_is_no_duration_is_refused(wait: str) -> None:
    found = CliRunner().invoke(main, ["search", "search.yaml", "--wait", wait])
    assert found.exit_code == 2
    assert "is a duration such as 90s, 20m or 1h" in found.output
