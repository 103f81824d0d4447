"""The command line: help, exit codes, the cheap commands."""

import json
import random
import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from flyweight.search.cli import main
from flyweight.search.plan import space_of
from flyweight.spaces import Policy


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
    assert "a search goes on with --resume" in found.output
    assert "Aborted" not in found.output


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
