"""The report: its numbers, what it escapes, what it does while a search runs."""

import csv
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from flyweight.search.cli import main
from flyweight.search.fragile import groups_sheet, layers_sheet, read_harms
from flyweight.search.pareto import EARLY
from flyweight.search.reading import read_run
from flyweight.search.record import at_work
from flyweight.search.report import render, write_report
from flyweight.spaces import BadInput

TEACHER = {
    "metric": 93.1,
    "metric_test": 93.0,
    "latency_ms": 0.800,
    "size_bytes": 2_800_000,
    "compressed_bytes": 2_600_000,
}
TARGET = {"runtime": "onnxruntime", "threads": 1, "batch_size": 1, "fingerprint": "avx2 7f"}
OBJECTIVE = {"speedup": 2.5, "latency_ms": None, "max_drop": 0.5, "size_bytes": None}
GROUPS = {"stem.0": 32, "body.0.c1": 32, "body.2.c1": 64, "body.4.c1": 128}
NONE = "\N{EN DASH}"
START = 1_760_000_000.0
FRONT, OTHERS = "Teacher and front", "Teacher and other"
ENDS, FAILURES, AGREE = "How trials", "Reasons", "Whether a rung"
RUNGS = "Results per rung"
# trial: (predicted ms, metric at the full rung, metric on test, measured ms, bytes)
FULL = {
    1: (0.318, 92.84, 92.70, 0.312, 610_000),
    2: (0.250, 92.20, 92.10, 0.246, 420_000),
    3: (0.402, 93.02, 92.95, 0.410, 720_000),
    4: (0.420, 92.60, 92.50, None, 730_000),  # dominated
    5: (0.300, 71.00, 70.00, None, 500_000),  # a student that was lost
}


def digest(trial: int) -> str:
    return hashlib.sha256(str(trial).encode()).hexdigest()


def policy(trial: int) -> dict:
    width = {"stem.0": 24, "body.0.c1": 16, "body.2.c1": 32, "body.4.c1": 64}
    precision = {f"body.{i}.c1": "int8" for i in range(trial + 3)}
    return {
        "version": 1,
        "prune": {"criterion": "taylor", "reconstruct": False, "width": width},
        "quantize": {"calibration": "mse", "qat": trial % 2 == 1, "precision": precision},
    }


def search_entry(**changes) -> dict:
    return {
        "kind": "search", "flyweight": "0.1.0", "task": "task.py:FashionMnist", "seed": 0,
        "time": START, "teacher": TEACHER, "objective": OBJECTIVE,
        "target": TARGET,
        "versions": {"torch": "2.13.0", "onnxruntime": "1.30.1"}, "data_digest": "ab" * 32,
        "groups": GROUPS, "layers": 12, **changes,
    }  # fmt: skip


def result_entry(trial: int, rung: str, ms: float, metric: float, size: int) -> dict:
    return {
        "kind": "result", "trial": trial, "digest": digest(trial), "policy": policy(trial % 9),
        "rung": rung, "loss": 100 - metric, "metric": metric, "size_bytes": size, "seconds": 3.0,
        "compressed_bytes": size - 50_000,
        "latency_ms": [0.97 * ms, ms, 1.04 * ms], "samples": 1000, "artifact": None,
        "time": START + 10 + trial, "constraint": -0.1,
    }  # fmt: skip


def end_entry(trial: int, reason: str, error: str | None = None) -> dict:
    return {
        "kind": "end", "trial": trial, "digest": digest(trial), "reason": reason, "error": error,
        "time": START + 100 + trial,
    }  # fmt: skip


def entries(**changes) -> list[dict]:
    """A search of 15 trials: 12 recalibrated, 7 short, 5 full, 3 failed, 2 over the limit."""
    out = [search_entry(**changes)]
    out += [{"kind": "begin", "trial": t, "digest": digest(t), "time": START} for t in range(15)]
    out += [result_entry(t, "recalibrate", 0.5, 60.0 + t, 700_000) for t in range(12)]
    out += [result_entry(t, "short", 0.4, 88.0 + t / 10, 700_000) for t in range(1, 8)]
    for trial, (predicted, metric, _, _, size) in FULL.items():
        out.append(result_entry(trial, "full", predicted, metric, size))
        out.append(end_entry(trial, "finished"))
    out += [end_entry(trial, "stopped") for trial in (0, 6, 7, 8, 9)]
    out += [end_entry(trial, "over_limit") for trial in (10, 11)]
    out.append(end_entry(12, "failed", "parity: 97.1% of predictions agree\nat layer body.2.c1"))
    out.append(end_entry(13, "failed", "out of memory"))
    out.append(end_entry(14, "failed", "parity: 97.1% of predictions agree\nat layer body.4.c1"))
    return out


def front_model(trial: int) -> dict:
    predicted, metric, test, measured, size = FULL[trial]
    return {
        "digest": digest(trial), "metric": metric, "metric_test": test, "latency_ms": measured,
        "latency_spread": 0.012, "size_bytes": size, "compressed_bytes": size - 50_000,
        "predicted_latency_ms": [0.97 * predicted, predicted, 1.04 * predicted],
        "artifact": f"artifacts/{digest(trial)}/model.onnx",
    }  # fmt: skip


def result(**changes) -> dict:
    return {
        "flyweight": "0.1.0", "task": "task.py:FashionMnist", "seed": 0, "wall_s": 251.0,
        "trials": {"recalibrate": 12, "short": 7, "full": 5}, "objective": OBJECTIVE,
        "target": TARGET, "teacher": TEACHER,
        "front": [front_model(2), front_model(1), front_model(3)],
        "best": digest(1), "nearest_miss": None, "mlflow_run_id": "0123abcd", **changes,
    }  # fmt: skip


def run_directory(folder: Path, entries: list[dict], result: dict | None = None) -> Path:
    """A run directory with what the report reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "record.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


class Page(HTMLParser):
    """Tables as lists of rows of text, by caption, the visible text, all attributes, ids and open
    tags."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text("utf-8")
        self.tables: dict[str, list[list[str]]] = {}
        self._table: list[list[str]] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self._cell = False
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "table":
            self._table = []
        elif tag == "tr":
            self._table.append([])
        elif tag in ("td", "th"):
            self._table[-1].append("")
            self._cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data):
        if "style" in self.tags[-1:] and "{" in data:
            return
        self.words.append(data)
        if self._cell:
            self._table[-1][-1] += data
        elif "caption" in self.tags[-1:] and data.strip():
            assert data not in self.tables
            self.tables[data] = self._table

    def table(self, caption: str) -> list[list[str]]:
        """The table whose caption begins with ``caption``."""
        (found,) = [rows for name, rows in self.tables.items() if name.startswith(caption)]
        return found

    def row(self, table: str, name: str) -> list[str]:
        """The cells of the row whose first cell begins with ``name``."""
        (found,) = [r for r in self.table(table) if r[0].startswith(name)]
        return [" ".join(cell.split()) for cell in found]


def explanation(name: str = "body.0.c1", kernels: int = 3) -> dict:
    """What `flyweight explain --json` says of trial 1: a session of 0.01 ms, then kernels."""
    case = {"width": 16, "change_ms": 0.002, "deviation_ms": 0.0005}
    rows = [
        {
            "name": f"{name}.{i}", "kind": "conv", "width": 24, "full_width": 32,
            "precision": "int8" if i % 2 else "fp32", "ms": 0.03 + i / 1000,
            "deviation_ms": 0.001, "teacher_ms": 0.08 + i / 1000, "teacher_deviation_ms": 0.002,
        }
        for i in range(kernels)
    ]  # fmt: skip
    session = rows[0] | {
        "name": "", "kind": "session", "width": None, "full_width": None, "precision": "",
        "ms": 0.01, "teacher_ms": 0.01,
    }  # fmt: skip
    gone = rows[0] | {"name": f"{name}.gone", "ms": None, "precision": None, "width": None}
    return {
        "digest": digest(1), "predicted_latency_ms": [0.30, 0.32, 0.34],
        "teacher_predicted_latency_ms": [0.78, 0.80, 0.82], "kernels": [session, *rows, gone],
        "kinds": [rows[0] | {"precision": "int8", "ms": 0.2, "teacher_ms": 0.0}],
        "groups": [
            {"name": name, "width": 24, "full_width": 32, "narrower": case, "wider": None},
        ],
        "layers": [
            {"name": name, "group": name, "width": 24, "precision": "int8",
             "widths": [case, case | {"width": 24, "change_ms": -0.004}]},
        ],
    }  # fmt: skip


def explained_run(folder: Path, **how) -> Path:
    run_directory(folder, entries(predicted_by="profile"), result(predicted_by="profile"))
    (folder / "explain.json").write_text(json.dumps(explanation(**how)))
    return folder


def page_of(run_dir: Path) -> Page:
    """The page of a run, without the files beside it."""
    path = run_dir / "report.html"
    path.write_text(render(read_run(run_dir)), "utf-8")
    return Page(path)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = tmp_path_factory.mktemp("page")
    return Page(write_report(run_directory(folder, entries(), result())))


def test_headline(page: Page) -> None:
    assert "2.56 times faster, 0.26 points lost" in page.text
    assert "2.80 MB of the teacher become 610 kB (4.6 to 1)" in page.text
    assert "on the test set 0.30 points lost" in page.text
    assert "at least 2.5 times faster; at most 0.5 points lost" in page.text
    assert "not ended" not in page.text


def test_front_table(page: Page) -> None:
    assert page.row(FRONT, digest(1)[:10]) == [
        f"{digest(1)[:10]} best", "2.56", "0.312 1.2%", "0.318 0.308 to 0.331", "0.26 92.84",
        "0.30 92.70", NONE, "610 kB 560 kB compressed", "56%", "4 of 12", "taylor",
        "mse trained with it",
    ]  # fmt: skip
    assert page.row(FRONT, "teacher")[:5] == ["teacher", "1.00", "0.800", NONE, f"{NONE} 93.10"]
    assert page.row(FRONT, digest(2)[:10])[-1] == "mse"
    assert [row[0][:10] for row in page.table(FRONT)[2:]] == [digest(t)[:10] for t in (2, 1, 3)]


def test_training_that_was_given_up_is_told(tmp_path: Path) -> None:
    given_up = [e | {"settled": e["kind"] == "result" and e["trial"] == 1} for e in entries()]
    found = page_of(run_directory(tmp_path, given_up, result()))
    assert found.row(FRONT, digest(1)[:10])[-1] == "mse trained no further"
    assert found.row(FRONT, digest(3)[:10])[-1] == "mse trained with it"


def test_training_that_diverged_is_told(tmp_path: Path) -> None:
    why = {"settled": True, "diverged": "distillation diverged after 64 samples: the loss is nan"}
    told = [e | (why if e["kind"] == "result" and e["trial"] == 1 else {}) for e in entries()]
    found = page_of(run_directory(tmp_path, told, result()))
    assert found.row(FRONT, digest(1)[:10])[-1] == "mse training diverged"


def test_everything_drawn_is_in_a_table(page: Page) -> None:
    others = [row[0][:10] for row in page.table(OTHERS)[2:]]
    assert sorted(others) == sorted(digest(t)[:10] for t in (4, 5))
    assert page.row(OTHERS, digest(4)[:10])[2] == NONE  # not measured
    assert "1 other artifact lies below the figure" in page.text


def test_trials_and_failures(page: Page) -> None:
    assert page.table(RUNGS)[1:] == [
        ["recalibrate", "12", "0:36", "3.0", "3.0"],
        ["short", "7", "0:21", "3.0", "3.0"],
        ["full", "5", "0:15", "3.0", "3.0"],
    ]
    assert dict(page.table(ENDS)[1:]) == {
        "finished": "5", "stopped": "5", "failed": "3", "over limit": "2",
    }  # fmt: skip
    assert page.table(FAILURES)[1:] == [
        ["2", "parity: 97.1% of predictions agree", "12, 14"],
        ["1", "out of memory", "13"],
    ]


def test_how_far_rungs_agree(tmp_path: Path, page: Page) -> None:
    assert page.row(AGREE, "recalibrate, short")[1:] == ["7", "0", "1.00 biased", NONE]
    assert page.row(AGREE, "short, full")[1:3] == ["5", "0"]
    known = entries()
    for entry in known:
        if entry.get("rung") == "recalibrate":
            entry |= {"through": "chance", "latency_ms": [0.1, 0.1 + entry["trial"] % 3, 4.0]}
    known += [result_entry(t, "short", 0.4, 88.0 + t / 10, 700_000) for t in (0, 8, 9, 10, 11)]
    for entry in known:  # of the first none goes on by chance
        entry |= {"trial": entry["trial"] + EARLY} if "trial" in entry else {}
    page = page_of(run_directory(tmp_path / "chance", known))
    assert page.row(AGREE, "recalibrate, short")[1:] == ["12", "12", "1.00", "1.00"]
    assert "Biased: too few went on by chance" in page.text


def test_every_version_is_told_once(tmp_path: Path) -> None:
    versions = {"flyweight": "0.1.0", "torch": "2.13.0"}
    text = page_of(run_directory(tmp_path, entries(versions=versions), result())).text
    assert text.count("flyweight 0.1.0") == text.count("torch 2.13.0") == 1


def test_where_it_ran_and_how_to_repeat_it(page: Page) -> None:
    for text in ("onnxruntime, 1 thread, batch 1", "avx2 7f", "torch 2.13.0", "took 4:11"):
        assert text in page.text
    assert (
        f"flyweight replay artifacts/{digest(1)}/policy.json --spec spec.yaml # best" in page.text
    )


def test_needs_nothing_from_outside(page: Page) -> None:
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    loads = ("src", "href", "xlink:href", "data", "action", "srcset", "poster")
    assert all(v.startswith("#") for _, name, v in page.attributes if name in loads)
    assert all(u.startswith("#") for u in re.findall(r"url\(['\"]?([^)]*)\)", page.source))
    assert "@import" not in page.source
    assert set(re.findall(r"https?://[^\"'\s<]+", page.source)) <= {
        "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink",  # names, not places
    }  # fmt: skip


def test_is_one_whole_page(page: Page) -> None:
    assert page.source.startswith("<!DOCTYPE html>")
    assert page.source.count("<!DOCTYPE") == 1
    assert "<?xml" not in page.source
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert "prefers-color-scheme: dark" in page.source
    assert not re.search("#0000f[1-4]", page.source)  # placeholders became variables


def test_same_input_same_page(tmp_path: Path) -> None:
    run_directory(tmp_path, entries(), result())
    assert write_report(tmp_path).read_bytes() == write_report(tmp_path).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "front.csv", "front.png", "record.jsonl", "report.html", "result.json", "trials.csv",
    ]  # fmt: skip


def test_csv_has_all_digits(tmp_path: Path) -> None:
    write_report(run_directory(tmp_path, entries(), result()))
    rows = list(csv.DictReader((tmp_path / "front.csv").open(newline="")))
    assert [row["digest"] for row in rows] == [digest(t) for t in (2, 1, 3)]
    assert float(rows[1]["speedup"]) == 0.8 / 0.312
    assert (rows[1]["mark"], rows[1]["measured"], rows[1]["qat"]) == ("best", "True", "yes")
    assert float(rows[1]["drop_test"]) == pytest.approx(0.3)


def test_a_search_that_still_runs(tmp_path: Path) -> None:
    running = [
        *entries(),
        {"kind": "begin", "trial": 15, "digest": digest(15), "time": START},
    ]
    page = page_of(run_directory(tmp_path, running))
    assert "This search has not ended" in page.text
    assert "1 running, 3 failed, 2 over the limit" in page.text
    # The best by prediction: trial 1 is 0.800 / 0.318 times faster.
    assert "2.52 times faster, 0.26 points lost" in page.text
    assert "0.318 ms predicted" in page.text
    assert [row[0][:10] for row in page.table(FRONT)[2:]] == [digest(t)[:10] for t in (2, 1, 3)]
    assert page.row(FRONT, digest(1)[:10])[2] == NONE
    assert ["still running", "1"] in page.table(ENDS)


def test_half_a_last_line_is_a_search_that_writes(tmp_path: Path) -> None:
    run_directory(tmp_path, entries())
    with (tmp_path / "record.jsonl").open("a") as file:
        file.write('{"kind":"res')
    assert "2.52 times faster" in page_of(tmp_path).text


def test_nothing_feasible(tmp_path: Path) -> None:
    strict = {**OBJECTIVE, "speedup": 3.0, "max_drop": 0.2}
    ended = result(objective=strict, best=None, nearest_miss=digest(1))
    page = page_of(run_directory(tmp_path, entries(objective=strict), ended))
    assert "Nothing keeps to the limits" in page.text
    assert "The nearest is 2.56 times faster, 0.26 points lost." in page.text
    assert (
        "It misses: 2.56 times faster, the limit is 3; 0.26 points lost, the limit is 0.2."
        in page.text
    )
    assert page.row(FRONT, digest(1)[:10])[0].endswith("nearest miss")


def test_a_search_that_was_cut_off_early_says_what_is_lacking(tmp_path: Path) -> None:
    def report() -> Result:
        return CliRunner().invoke(main, ["report", str(tmp_path)])

    assert (report().exit_code, "the directory of a run?" in report().output) == (2, True)
    (tmp_path / "record.jsonl").write_text("")  # while it prepared
    done = report()
    assert done.exit_code == 2
    assert "was cut off before its first trial, so there is nothing to report" in done.output
    assert f"flyweight search {tmp_path}/spec.yaml --out {tmp_path} --resume" in done.output
    run_directory(tmp_path, [search_entry()])
    done = report()
    assert done.exit_code == 0
    assert "No trial has finished its first rung: the report has no front" in done.output
    page = Page(tmp_path / "report.html")
    assert "No trial has finished its first rung." in page.text
    assert "Where it was cut off, flyweight search spec.yaml --out . --resume" in page.text
    run_directory(tmp_path, [search_entry(), result_entry(0, "short", 0.4, 88.0, 700_000)])
    assert "No trial has finished the full rung" in report().output
    run_directory(tmp_path, entries(), result())
    assert "no front" not in report().output


def test_a_task_of_a_notebook_is_not_said_to_have_commands(tmp_path: Path) -> None:
    """They are other processes, which cannot load it."""
    run_directory(tmp_path, entries(task="<notebook>:Net"), result(task="<notebook>:Net"))
    page = page_of(tmp_path)
    assert "flyweight replay artifacts/" not in page.text
    assert "flyweight profile" not in page.text
    assert "flyweight.search.load_run(FOLDER).model(DIGEST)" in page.text
    assert "with seed=0" in page.text
    running = page_of(run_directory(tmp_path / "b", entries(task="<notebook>:Net")))
    assert "the same call of search with resume=True and this folder as out goes on" in running.text


@pytest.mark.parametrize("ended", [None, result(front=[], best=None)])
def test_no_artifact_at_all(tmp_path: Path, ended: dict | None) -> None:
    page = page_of(run_directory(tmp_path, [search_entry()], ended))
    assert "There is no artifact" in page.text
    assert "No trial failed." in page.text
    assert "There is no artifact to rebuild." in page.text


def test_no_limits_no_test_data_no_widths_known(tmp_path: Path) -> None:
    teacher = {**TEACHER, "metric_test": None}
    models = [{**front_model(1), "metric_test": None}]
    only_size = {"size_bytes": 700_000}
    ended = result(teacher=teacher, objective=only_size, front=models)
    record = entries(teacher=teacher, objective=only_size, groups=None, layers=None)
    page = page_of(run_directory(tmp_path, record, ended))
    row = page.row(FRONT, digest(1)[:10])
    assert row[5:7] == [NONE, NONE]
    assert row[8:10] == ["34 channels in 4 groups", "4"]
    assert "Limits: at most 700 kB;" in page.text


def test_what_zeros_and_dropped_blocks_bring_is_told(tmp_path: Path) -> None:
    limit = {"compressed_bytes": 600_000}
    record = entries(objective=limit, blocks={"body.2": ["body.2.c1"], "body.4": ["body.4.c1"]})
    for entry in record:
        if entry["kind"] == "result" and entry["digest"] == digest(1):
            entry["policy"]["prune"] |= {
                "sparsity": 0.75, "drop": ["body.2", "body.4"],
                "width": {"stem.0": 24, "body.0.c1": 16},
            }  # fmt: skip
    page = Page(write_report(run_directory(tmp_path, record, result(objective=limit))))
    assert "Limits: at most 600 kB compressed;" in page.text
    row = page.row(FRONT, digest(1)[:10])
    assert row[7] == "610 kB 560 kB compressed"
    assert row[8] == "31% 75% zeros without body.2, body.4"  # (24/32 + 16/32 + 0 + 0) / 4
    assert "zeros" not in page.row(FRONT, digest(2)[:10])[8]
    rows = list(csv.DictReader((tmp_path / "front.csv").open()))
    found = {r["digest"]: (r["compressed_bytes"], r["sparsity"], r["dropped_blocks"]) for r in rows}
    assert found[digest(1)] == ("560000.0", "75%", "body.2, body.4")
    assert found[digest(2)] == ("370000.0", "", "")


def test_what_a_user_supplies_is_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script>$x$'
    record = entries(task=evil, target={"fingerprint": evil}, versions={evil: evil})
    record += [end_entry(20, "failed", evil), end_entry(21, evil)]
    for entry in record:
        if entry["kind"] == "result":
            entry["policy"]["prune"]["criterion"] = evil
    page = page_of(run_directory(tmp_path, record, result(task=evil)))
    assert "script" not in page.tags
    assert "<script" not in page.source
    assert page.source.count("&lt;script&gt;") >= 5
    assert evil in page.text


def test_what_breaks_a_limit_is_told_apart(tmp_path: Path) -> None:
    page = Page(write_report(run_directory(tmp_path, entries(), result())))
    outside = "outside the limits"
    assert [page.row(FRONT, digest(t)[:10])[0] for t in (1, 2, 3)] == [
        f"{digest(1)[:10]} best", f"{digest(2)[:10]} {outside}", f"{digest(3)[:10]} {outside}",
    ]  # fmt: skip
    assert "front, outside the limits" in page.text
    rows = list(csv.DictReader((tmp_path / "front.csv").open()))
    assert {r["digest"]: r["misses"] for r in rows} == {
        digest(1): "", digest(2): "0.90 points lost, the limit is 0.5",
        digest(3): "1.95 times faster, the limit is 2.5",
    }  # fmt: skip
    free = {"size_bytes": 800_000}
    run_directory(tmp_path, entries(objective=free), result(objective=free))
    assert outside not in page_of(tmp_path).text


def test_where_the_time_goes(tmp_path: Path) -> None:
    page = page_of(explained_run(tmp_path))
    headline = "0.3200 ms predicted (0.3000 to 0.3400) against 0.8000 ms of the teacher: 2.50 times"
    assert headline in page.text
    kernels, kinds, groups = (page.table(c) for c in ("Policy ", "By kind", "What the next"))
    assert kernels[1:3] == [
        ["(each call)", "session", "", "0.0100 ±0.0040", "0.0100 ±0.0020", "3.1%"],
        ["body.0.c1.0", "conv fp32", "24/32", "0.0800 ±0.0040", "0.0300 ±0.0020", "9.4%"],
    ]
    assert kernels[-2:] == [
        ["body.0.c1.gone", "conv gone", "", "0.0800 ±0.0040", "", ""],
        ["all", "", "", "0.8000", "0.3200", ""],
    ]
    assert kinds[1] == ["conv int8", "", "0.2000 ±0.0020", "62.5%"]
    assert groups[1] == ["body.0.c1", "24/32", "16: +0.0020 ±0.0010", ""]
    line = "body.0.c1: int8 is slower at 16 channels and below; it is int8 at 24, where int8 takes"
    assert f"{line} -0.0040 ±0.0010 ms" in page.text
    assert "predicted from a device profile" in page.text
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert not re.search("#0000f[1-4]", page.source)


def test_many_kernels_are_drawn_in_one_figure(tmp_path: Path) -> None:
    page = page_of(explained_run(tmp_path, kernels=60))
    # The first 40 of 60, the session, and one that only the teacher has.
    assert "42 others: 1.9900 ms, teacher 4.0700 ms" in page.text
    assert len(page.table("Policy ")) == 64
    assert page.source.count("body.0.c1.59 24/32 int8") == 1
    assert "body.0.c1.2 24/32" not in page.source


def test_without_a_device_profile_it_says_how_to_get_one(tmp_path: Path) -> None:
    run_directory(tmp_path, entries(predicted_by="timing"), result(predicted_by="timing"))
    page = page_of(tmp_path)
    assert "timed untrained" in page.text
    assert "Timed untrained, ms" in page.table(FRONT)[0]
    command = f"flyweight explain artifacts/{digest(1)}/policy.json --spec spec.yaml"
    assert "flyweight profile --spec spec.yaml -o profile.jsonl" in page.text
    assert f"{command} --profile profile.jsonl --json > explain.json" in page.text
    run_directory(tmp_path, entries(predicted_by="profile"), result(predicted_by="profile"))
    (tmp_path / "explain.json").write_text("")  # where that command failed
    text = page_of(tmp_path).text
    assert f"{command} --json > explain.json" in text
    assert "flyweight profile" not in text
    assert "Where the time goes" not in Page(
        write_report(run_directory(tmp_path, entries(), result(front=[], best=None)))
    ).text  # fmt: skip


def test_names_of_kernels_are_escaped(tmp_path: Path) -> None:
    page = page_of(explained_run(tmp_path, name="<script>$x$</script>"))
    assert "script" not in page.tags
    assert "<script" not in page.source
    assert "<script>$x$</script>.0 24/32 fp32" in page.text


@pytest.mark.parametrize("content", ["{}", "[]", '{"kernels": 1}', "{"])
def test_damaged_explanation(tmp_path: Path, content: str) -> None:
    (explained_run(tmp_path) / "explain.json").write_text(content)
    with pytest.raises(BadInput, match=r"explain\.json"):
        write_report(tmp_path)


def test_missing_record(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no file .*record\.jsonl"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        b"{not json}\n",
        b'"\xff\xfe"\n',
        b"[1]\n",
        b'{"trial": 1}\n',
        b'{"kind":"result","trial":1,"digest":"a","rung":"half","latency_ms":[1,1,1],"metric":1}\n',
        b'{"kind":"result","trial":1,"digest":"a","rung":"full","latency_ms":[1,1],"metric":1}\n',
        b'{"kind":"end","trial":"x","reason":"failed"}\n',
    ],
)
def test_damaged_record(tmp_path: Path, line: bytes) -> None:
    run_directory(tmp_path, entries())
    with (tmp_path / "record.jsonl").open("ab") as file:
        file.write(line)
    with pytest.raises(BadInput, match=r"record\.jsonl"):
        write_report(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"teacher": 1}', "{"])
def test_damaged_result(tmp_path: Path, content: str) -> None:
    run_directory(tmp_path, entries())
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(BadInput, match=r"result\.json"):
        write_report(tmp_path)


def test_record_without_a_search(tmp_path: Path) -> None:
    (tmp_path / "record.jsonl").write_text("")
    with pytest.raises(BadInput, match="no search entry"):
        write_report(tmp_path)


HARMS = {
    "drop/body.1": {"False": 0.0, "True": 0.4},
    "width/body.0.c1": {"8": 0.3, "16": 0.1, "32": 0.0},
    "width/<stem>": {"8": 2.0, "16": 0.5, "32": 0.0},
    "precision/body.0.c1": {"fp32": 0.0, "int8": 0.002},
    "precision/head": {"fp32": 0.0},
}


def test_what_is_fragile(tmp_path: Path) -> None:
    run_directory(tmp_path, entries(), result())
    (tmp_path / "sensitivity.json").write_text(json.dumps({"harm": HARMS}))
    page = write_report(tmp_path).read_text()
    assert "What is fragile" in page
    assert page.index("&lt;stem&gt;") < page.index("body.0.c1", page.index("What is fragile"))
    assert "<stem>" not in page
    harms = read_harms(tmp_path)
    groups = groups_sheet(harms, {"prune": {"width": {"body.0.c1": 16}}})
    assert groups.rows == [
        ["<stem>", "32 of 32", "0", "16: 0.5", "8: 2"],
        ["body.0.c1", "16 of 32", "0.1", "16: 0.1", "8: 0.3"],
    ]
    layers = layers_sheet(harms, {"quantize": {"precision": {"body.0.c1": "int8"}}})
    assert layers.rows == [["body.1", "kept", "0.4"], ["body.0.c1", "int8", "0.002"]]


def test_a_table_in_which_nothing_was_judged_is_not_shown(tmp_path: Path) -> None:
    run_directory(tmp_path, entries(), result())
    table = {"harm": HARMS, "judged": 0, "choices": 8}
    (tmp_path / "sensitivity.json").write_text(json.dumps(table))
    page = write_report(tmp_path).read_text()
    assert "What is fragile" not in page
    assert "Width harms" not in page


@pytest.mark.parametrize(("judged", "said"), [(3, "3 of 8 choices were judged"), (8, "")])
def test_it_is_told_how_much_of_a_table_was_judged(tmp_path: Path, judged: int, said: str) -> None:
    run_directory(tmp_path, entries(), result())
    table = {"harm": HARMS, "judged": judged, "choices": 8}
    (tmp_path / "sensitivity.json").write_text(json.dumps(table))
    page = write_report(tmp_path).read_text()
    assert "What is fragile" in page
    assert ("choices were judged" in page) == bool(said)
    assert said in page


@pytest.mark.parametrize("content", ["", "[]", '{"harm": {"width/a": 3}}', "{"])
def test_a_damaged_sensitivity_table_is_named(tmp_path: Path, content: str) -> None:
    run_directory(tmp_path, entries(), result())
    (tmp_path / "sensitivity.json").write_text(content)
    with pytest.raises(BadInput, match=r"sensitivity\.json"):
        write_report(tmp_path)


def test_a_run_without_a_table_says_nothing_of_it(tmp_path: Path) -> None:
    run_directory(tmp_path, entries(), result())
    assert "What is fragile" not in write_report(tmp_path).read_text()


def spec_of(folder: Path, strategy: str) -> Path:
    (folder / "spec.yaml").write_text(f"search: {{strategy: {strategy}}}\n")
    return folder


def test_other_runs_stand_beside(tmp_path: Path) -> None:
    run = spec_of(run_directory(tmp_path / "joint-run", entries(), result()), "joint")
    faster = result(teacher={**TEACHER, "latency_ms": 0.4}, best=digest(2), wall_s=60.0)
    other = spec_of(run_directory(tmp_path / "uniform-run", entries(), faster), "uniform")
    page = Page(write_report(run, [other]))
    table = page.table("Runs side by side")
    assert table[1] == ["joint-run", "joint", "24", "4:11", "3", "best", "2.56", "0.26", "0.30"]
    # By the teacher as it was timed there: 0.4 / 0.246.
    assert table[2] == ["uniform-run", "uniform", "24", "1:00", "3", "best", "1.63", "0.90", "0.90"]
    assert "front of uniform-run, uniform" in page.text
    assert "Runs side by side" not in page_of(run).text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data_digest": "cd" * 32}, "its data must be those of"),
        ({"target": {**TARGET, "threads": 2}}, "its target must be those of"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, changes: dict, words: str) -> None:
    run = run_directory(tmp_path / "run", entries(), result())
    other = run_directory(tmp_path / "other", entries(**changes), result())
    with pytest.raises(BadInput, match=words):
        write_report(run, [other])
    assert not (run / "report.html").exists()


def test_how_the_front_grew(page: Page) -> None:
    # Full results come 11 to 15 s after the beginning, the last of all results 21 s.
    assert page.table("By predicted")[1:] == [
        ["0:16", "5", "3", "2.52", "0.26", "best"],
        ["0:21", "5", "3", "2.52", "0.26", "best"],
    ]


def test_time_between_sessions_is_not_at_work() -> None:
    times = [("search", 100), ("result", 110), ("search", 500), ("result", 507)]
    assert at_work([{"kind": kind, "time": at} for kind, at in times]) == [0, 10, 10, 17]


def test_time_in_which_artifacts_are_measured_is_not_at_work() -> None:
    times = [("search", 100), ("result", 110), ("measured", 90_000), ("search", 95_000)]
    assert at_work([{"kind": kind, "time": at} for kind, at in times]) == [0, 10, 10, 10]


def test_predicted_against_measured(page: Page) -> None:
    # 0.312 of 0.318 (-1.9%), 0.246 of 0.250 (-1.6%), 0.410 of 0.402 (+2.0%): within -3% to +4%.
    assert "3 of 3 measured latencies lay within" in page.text
    assert "they were -1.9% to +2.0% from its middle" in page.text


def test_the_chosen_layer_by_layer(tmp_path: Path) -> None:
    known = entries(layer_groups={"stem.0": "stem.0", "body.0.c1": "body.0.c1", "head": None})
    for entry in known:
        if entry["kind"] == "result" and entry["digest"] == digest(2):
            entry["policy"]["prune"]["width"] = {"stem.0": 8, "body.0.c1": 16}
    run_directory(tmp_path, known, result())
    (tmp_path / "sensitivity.json").write_text(json.dumps({"harm": HARMS}))
    page = page_of(tmp_path)
    rows = page.table("Layers of the best")
    assert [" ".join(name.split()) for name in rows[0]] == [
        "Layer", "faster 3.25 times, 0.90 lost", "best 2.56 times, 0.26 lost",
        "slower 1.95 times, 0.08 lost", "Width harms", "int8 harms",
    ]  # fmt: skip
    assert rows[1:4] == [
        ["stem.0", "8 fp32", "24 fp32", "24 fp32", "", ""],
        ["body.0.c1", "16 int8", "16 int8", "16 int8", "0.1", "0.002"],
        ["head", " fp32", " fp32", " fp32", "", ""],
    ]
    assert page.source.count('class="differs"') == 1
    assert ["quantize.qat", "no", "yes", "yes"] in [row[:4] for row in rows]


def test_trials_as_csv(tmp_path: Path) -> None:
    known = entries()
    known[1:1] = [{"kind": "measured", "digest": digest(1), "latency_ms": 0.312,
                   "teacher_latency_ms": 0.8, "time": START}]  # fmt: skip
    write_report(run_directory(tmp_path, known, result()))
    rows = list(csv.DictReader((tmp_path / "trials.csv").open(newline="")))
    assert [int(row["trial"]) for row in rows] == list(range(15))
    assert (rows[1]["rung"], rows[1]["ended"], rows[1]["latency_ms"]) == (
        "full",
        "finished",
        "0.312",
    )
    assert [rows[1][f"metric_{rung}"] for rung in ("recalibrate", "short", "full")] == [
        "61.0", "88.1", "92.84",
    ]  # fmt: skip
    assert rows[12]["error"].startswith("parity: 97.1%")


def test_a_search_that_was_resumed_is_running(tmp_path: Path) -> None:
    measured = {"kind": "measured", "digest": digest(1), "latency_ms": 0.312, "time": START + 300,
                "teacher_latency_ms": 0.8}  # fmt: skip
    again = search_entry(time=START + 400)
    run_directory(tmp_path, [*entries(), measured, again], result())
    assert "This search has not ended" in page_of(tmp_path).text
    run_directory(tmp_path, [*entries(), measured, again, measured], result())
    page = page_of(tmp_path)
    assert "not ended" not in page.text
    assert "Began 2025-10-09 08:53 UTC, took 4:11" in " ".join(page.text.split())  # the first


def test_a_search_that_was_resumed_and_measured_nothing_has_ended_all_the_same(
    tmp_path: Path,
) -> None:
    """Its target is not there: latencies stay predicted."""
    done, again = {"kind": "done"}, search_entry(time=START + 400)
    run_directory(tmp_path, [*entries(), done, again, done], result())
    assert "not ended" not in page_of(tmp_path).text
    run_directory(tmp_path, [*entries(), done, again], result(front=[], best=None))
    assert "This search has not ended" in page_of(tmp_path).text


def test_the_front_so_far_holds_what_is_ahead_in_loss(tmp_path: Path) -> None:
    known = entries()
    for entry in known:  # trial 4 is behind trial 3 in metric and latency
        if entry.get("rung") == "full" and entry["trial"] == 4:
            entry["loss"] = 0.001
    page = page_of(run_directory(tmp_path, known))
    found = [row[0][:10] for row in page.table(FRONT)[2:]]
    assert found == [digest(t)[:10] for t in (2, 1, 3, 4)]


def thousands(folder: Path) -> Path:
    """A search of 5,000 trials, 700 of which finished."""
    out = [search_entry()]
    for trial in range(5000):
        out += [{"kind": "begin", "trial": trial, "digest": digest(trial), "time": START + trial}]
        ms, metric = 0.2 + trial % 701 / 1500, 90 + trial % 503 / 200
        rungs = ("recalibrate", "short", "full")[: 3 if trial % 7 == 0 else 1 + (trial % 3 == 0)]
        changes = {"time": START + trial}
        out += [result_entry(trial, r, ms, metric, 600_000) | changes for r in rungs]
        error = f"parity at layer body.{trial}" if trial % 50 == 1 else None
        out.append(end_entry(trial, "failed" if error else "stopped", error))
    return run_directory(folder, out)


def test_thousands_of_trials_make_a_page_that_can_be_sent(tmp_path: Path) -> None:
    page = write_report(thousands(tmp_path))
    assert page.stat().st_size <= 5_000_000
    assert "5000" in Page(page).table(RUNGS)[1]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One with every section, one of thousands of trials."""
    run = explained_run(tmp_path_factory.mktemp("run"))
    (run / "sensitivity.json").write_text(json.dumps({"harm": HARMS}))
    other = run_directory(tmp_path_factory.mktemp("other"), entries(), result())
    return [write_report(run, [other]), write_report(thousands(tmp_path_factory.mktemp("many")))]


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_finds_nothing_serious(browser, pages, width: int, scheme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    for path in pages:
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.goto(path.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        found = Axe().run(page).response["violations"]
        bad = {v["id"]: v["nodes"] for v in found if v["impact"] in ("serious", "critical")}
        assert not bad
        assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing is cut off
        page.close()
