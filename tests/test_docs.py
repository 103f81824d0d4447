"""The pages for users: their commands run as they stand, their links lead somewhere."""

import os
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from torch import nn

from flyweight.search.plan import make_plan
from flyweight.search.spec import Objective, Spec

NAMES = ("quickstart", "own-model")


def blocks(text: str) -> list[tuple[str, str, str]]:
    """(language, title, content) of each fenced block."""
    found = re.findall(r"^```(\w*)(?: title=\"([^\"]*)\")?\n(.*?)^```", text, re.M | re.S)
    return [(language, title, content) for language, title, content in found]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_commands_of_a_page_run(root: Path, tmp_path: Path, name: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for language, title, content in blocks((root / "docs" / f"{name}.md").read_text()):
        if title:
            (tmp_path / title).write_text(content)
        elif language == "bash":
            done = subprocess.run(
                ["bash", "-euc", content], cwd=tmp_path, env=os.environ | {"PATH": path},
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, f"{content}\n{done.stdout}\n{done.stderr}"


def test_the_task_of_the_readme_plans_as_it_stands(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titled = {title: text for _, title, text in blocks((root / "README.md").read_text()) if title}
    assert sorted(titled) == ["search.yaml", "task.py"]
    for title, content in titled.items():
        (tmp_path / title).write_text(content)
    monkeypatch.chdir(tmp_path)
    wide = nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU()
    net = nn.Sequential(*wide, nn.Linear(1024, 10))
    torch.save(net.state_dict(), "weights.pt")
    found = make_plan(Path("search.yaml"), Console(file=StringIO()))
    assert found["cost"]["full_epochs"] == 20
    assert [case["kind"] for case in found["cases"]][:1] == ["smallest"]
    assert found["reachable"]


def test_the_links_of_the_readme_lead_somewhere(root: Path) -> None:
    text = (root / "README.md").read_text()
    linked = re.findall(r"\]\(([^)\s]+)\)", text)
    assert linked
    assert all((root / link).exists() for link in linked)
    assert "`docs/" not in text.replace("pages of `docs/`", "")  # a page's name is a link


def test_the_reference_has_every_default(root: Path) -> None:
    text = (root / "docs" / "reference.md").read_text()
    (told,) = (yaml.safe_load(content) for _, title, content in blocks(text) if title == "defaults")
    spec = Spec(task=told["task"], objective=Objective(speedup=2.0))
    assert spec.model_dump(mode="json") == told


def anchors(text: str) -> set[str]:
    """By which mkdocs calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in headings}


def test_every_page_is_in_the_index_and_every_link_leads_somewhere(root: Path) -> None:
    pages = {path.name: path.read_text() for path in (root / "docs").glob("*.md")}
    listed = re.findall(r"[\w-]+\.md", yaml.dump(yaml.safe_load((root / "mkdocs.yml").read_text())))
    assert sorted(listed) == sorted(pages)
    for name, text in pages.items():
        for link, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", text):
            if "://" not in link:
                assert (root / "docs" / link).resolve().exists(), f"{name}: {link}"
            if anchor and (link or name).endswith(".md"):
                assert anchor in anchors(pages[link or name]), f"{name}: {link}#{anchor}"
