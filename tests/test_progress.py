"""The live display: what it knows, what it says where, what it says in the end."""

import math
import time
from collections.abc import Callable
from io import StringIO

import pytest
from rich.console import Console

from flyweight.search import counting
from flyweight.search.progress import Progress, closing_sentence, closing_table
from flyweight.search.summary import Summary
from flyweight.search.words import clock_time, lost, metric_value, size

TEACHER = {
    "metric": 93.0,
    "metric_test": 92.8,
    "latency_ms": 1.0,
    "size_bytes": 2_800_000,
    "compressed_bytes": 2_600_000,
}
OBJECTIVE = {"speedup": 2.0, "latency_ms": None, "max_drop": 0.5, "size_bytes": None}
SEARCH = {"kind": "search", "teacher": TEACHER, "objective": OBJECTIVE}


def begin(trial: int) -> dict:
    return {"kind": "begin", "trial": trial, "digest": f"{trial:064x}"}


def result(trial: int, rung: str, ms: float, metric: float | None, size_bytes=600_000) -> dict:
    return {
        "kind": "result", "trial": trial, "digest": f"{trial:064x}", "rung": rung,
        "metric": metric, "latency_ms": [0.9 * ms, ms, 1.1 * ms], "size_bytes": size_bytes,
        "compressed_bytes": size_bytes - 100_000,
    }  # fmt: skip


def end(trial: int, reason: str, error: str | None = None) -> dict:
    return {
        "kind": "end", "trial": trial, "digest": f"{trial:064x}", "reason": reason, "error": error
    }  # fmt: skip


def summary(*entries: dict, objective: dict = OBJECTIVE) -> Summary:
    out = Summary()
    for entry in ({**SEARCH, "objective": objective}, *entries):
        out.add(entry)
    return out


def until(true: Callable[[], bool]) -> None:
    """Waits for another thread."""
    for _ in range(2000):
        time.sleep(0.01)
        if true():
            return
    raise AssertionError("it does not come")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# What it knows.


def test_counts() -> None:
    known = summary(
        *(begin(t) for t in range(5)),
        result(0, "recalibrate", 0.5, 60), result(0, "short", 0.5, 90),
        result(1, "recalibrate", 0.5, 60), end(1, "stopped"),
        end(2, "failed", "x"), end(3, "over_limit"),
        {"kind": "rejected", "count": 3}, {"kind": "of a later version"},
    )  # fmt: skip
    assert known.rungs() == "recalibrate 2, short 1, full 0"
    assert known.state() == "2 running, 1 failed, 4 over the limit"
    assert known.running == {0, 4}


def test_a_resumed_search_runs_nothing_yet() -> None:
    known = summary(begin(0), begin(1), result(1, "short", 0.5, 90), end(0, "interrupted"))
    known.add(SEARCH)
    assert (known.running, known.ended) == (set(), {})
    known.add(result(1, "full", 0.5, 60))
    assert known.running == {1}
    assert known.rungs() == "recalibrate 0, short 1, full 1"


def test_a_worker_that_died_is_told_and_its_trial_goes_on() -> None:
    out = StringIO()
    console = Console(file=out, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    with Progress(console, clock=Clock()) as display:
        for entry in (SEARCH, begin(0), result(0, "short", 0.4, 92.8)):
            display.entry(entry)
        display.entry({"kind": "died", "trial": 0, "digest": "0", "error": "killed\x1b[2J"})
    assert display.summary.running == {0}
    assert "trial 0 goes on elsewhere: killed [2J" in out.getvalue()
    out = StringIO()
    with Progress(Console(file=out, width=100), clock=Clock()) as display:
        display.entry(SEARCH)
        display.entry(result(0, "full", 0.4, 92.8) | {"note": "begun anew: it has no checkpoint"})
    assert "0.20 points lost (begun anew: it has no checkpoint)" in out.getvalue()


def test_best_is_the_fastest_feasible_under_a_limit_of_the_drop() -> None:
    known = summary(
        result(1, "full", 0.40, 92.60),
        result(2, "full", 0.30, 92.40),  # loses too much
        result(3, "full", 0.45, 92.95),
        result(4, "full", 0.60, 93.00),  # too slow
        result(5, "short", 0.10, 93.00),  # of a lower rung
        result(6, "full", 0.10, None),  # diverged
    )
    best = known.best()
    assert best is not None
    assert int(best.digest, 16) == 1
    assert known.best_line() == "2.50 times faster, 0.40 points lost (predicted, within the limits)"


def test_best_is_the_highest_metric_without_a_limit_of_the_drop() -> None:
    only_speed = {"speedup": 2.0}
    known = summary(
        result(1, "full", 0.40, 92.0), result(3, "full", 0.45, 92.9), result(4, "full", 0.6, 93.0),
        objective=only_speed,
    )  # fmt: skip
    best = known.best()
    assert best is not None
    assert int(best.digest, 16) == 3


def test_nearest_miss_where_nothing_is_feasible() -> None:
    known = summary(result(1, "full", 0.52, 92.9), result(2, "full", 0.20, 91.0))
    best = known.best()
    assert best is not None
    assert int(best.digest, 16) == 1  # 4% too slow, not 1.5 points too bad
    assert known.misses(best) == ["1.92 times faster, the limit is 2"]
    assert known.best_line().endswith("(predicted, over the limits)")


def test_limits_hold_to_the_digit() -> None:
    known = summary(result(1, "full", 0.5, 92.5))
    best = known.best()
    assert best is not None
    assert known.excess(best) <= 0
    assert known.misses(best) == []


@pytest.mark.parametrize("objective", [
    {"speedup": 2.0}, {"latency_ms": 0.5}, {"max_drop": 0.5}, {"size_bytes": 500_000},
    {"latency_ms": 0.5, "max_drop": 0.5, "size_bytes": 500_000}, {"compressed_bytes": 400_000}, {},
])  # fmt: skip
@pytest.mark.parametrize("ms", [0.4, 0.5, 0.6])
@pytest.mark.parametrize("metric", [93.1, 92.5, 92.4])
@pytest.mark.parametrize("size_bytes", [500_000, 500_001])
def test_words_and_numbers_agree_on_what_is_feasible(objective, ms, metric, size_bytes) -> None:
    known = summary(result(1, "full", ms, metric, size_bytes), objective=objective)
    best = known.best()
    assert best is not None
    assert (known.excess(best) <= 0) == (not known.misses(best))


def test_a_measurement_replaces_the_prediction() -> None:
    known = summary(
        result(1, "full", 0.45, 92.8),
        {
            "kind": "measured", "digest": f"{1:064x}", "latency_ms": 0.42,
            "latency_spread": 0.01, "teacher_latency_ms": 1.05,
        },
        {"kind": "measured", "digest": "unknown", "latency_ms": 1, "teacher_latency_ms": 1},
    )  # fmt: skip
    assert known.best_line() == "2.50 times faster, 0.20 points lost (measured, within the limits)"


def test_another_target_prices_what_is_known_anew() -> None:
    measured = {
        "kind": "measured", "digest": f"{1:064x}", "latency_ms": 0.42, "latency_spread": 0.01,
        "teacher_latency_ms": 1.05,
    }  # fmt: skip
    there = {**SEARCH, "teacher": TEACHER | {"latency_ms": 3.0}}
    priced = {"kind": "priced", "trial": 1, "digest": f"{1:064x}", "latency_ms": [1.9, 2.0, 2.1]}
    known = summary(result(1, "full", 0.45, 92.8), measured, there, priced)
    assert known.best_line() == "1.50 times faster, 0.20 points lost (predicted, over the limits)"
    known.add(priced | {"latency_ms": None})  # it cannot run there
    assert known.best() is None


def test_nothing_known_yet() -> None:
    assert Summary().best_line() == "none yet: no trial has finished the full rung"
    assert summary(result(1, "full", 0.5, None)).best() is None
    assert summary(result(1, "short", 0.5, 92.8)).best() is None


# Where the output is not a terminal.


def plain(**arguments) -> tuple[Progress, StringIO, Clock]:
    out, clock = StringIO(), Clock()
    console = Console(file=out, width=60)
    arguments = {"trials": 8, "budget_s": 240.0, **arguments}
    return Progress(console, clock=clock, **arguments), out, clock


def test_plain_lines() -> None:
    display, out, clock = plain()
    with display:
        display.entry(SEARCH)
        for second in range(12):
            clock.now += 1
            display.entry(begin(second)) if second % 2 else display.entry(
                result(second - 1 if second else 0, "short", 0.4, 92.8)
            )
        display.entry(result(3, "full", 0.4, 92.8))
    lines = out.getvalue().splitlines()
    assert len(lines) == 3  # at 5 s, at 10 s, the full rung; none is wrapped
    assert lines[0].startswith("0:05  recalibrate 0, short 3, full 0; ")
    assert lines[0].endswith("best none yet: no trial has finished the full rung; 3:55 left")
    assert lines[1].startswith("0:10  ")
    assert lines[2] == "trial 3, full: 0000000000, 2.50 times faster, 0.20 points lost"


def test_plain_has_no_control_codes_whatever_a_user_s_code_says() -> None:
    display, out, _ = plain()
    with display:
        display.entry(SEARCH)
        note = "\x1b[31mred\x1b[0m [bold]x[/bold] :smile:\r\nnext"
        display.entry(result(0, "full", 0.4, 92.8) | {"note": note})
    assert out.getvalue().endswith("([31mred [0m [bold]x[/bold] :smile: next)\n")


def test_a_line_comes_also_where_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "LINE_S", 0.02)
    monkeypatch.setattr(counting, "LOOK_S", 0.001)
    display, out, _ = plain()
    with display:
        display.entry(SEARCH)
        until(lambda: "recalibrate 0, short 0, full 0" in out.getvalue())
    out = StringIO()
    with counting.counting("Judging", 9, Console(file=out, width=100)) as told:
        told(3)
        until(lambda: "Judging: 3 of 9, 0:0" in out.getvalue())
        told(7)
    assert out.getvalue().splitlines()[-1].startswith("Judging: 7 of 9, ")
    out = StringIO()
    with counting.telling("Timing [it]", Console(file=out, width=100)):
        until(lambda: out.getvalue().startswith("Timing [it]\nTiming [it], 0:0"))


def test_while_there_is_enough_to_say_nothing_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "LOOK_S", 0.001)
    out = StringIO()
    with counting.telling("Checking", Console(file=out, width=100)):
        until(lambda: True)
    assert out.getvalue() == "Checking\n"
    terminal = Console(file=out, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    monkeypatch.setattr(counting, "LINE_S", 0.0)
    with counting.telling("On a terminal", terminal):
        until(lambda: True)
    assert out.getvalue().count("On a terminal") == 1


def test_entries_before_the_beginning_are_counted_and_not_shown() -> None:
    display, out, clock = plain(budget_s=None, trials=5)
    for entry in (SEARCH, result(0, "full", 0.4, 92.8), end(0, "finished")):
        display.entry(entry)
    clock.now += 1000
    with display:
        assert display.left() == (0.2, "4 trials to come")
        for trial in (1, 2, 3):
            clock.now += 4
            display.entry(end(trial, "stopped"))
    assert display.left() == (0.8, "0:04 left")  # three trials took 12 s, one is to come
    assert len(out.getvalue().splitlines()) == 1


def test_how_long_the_last_trials_take_is_not_known() -> None:
    """Those that stopped go on once no more begin, for whole rungs; no pace tells how long."""
    for budget_s, most in ((None, ""), (100.0, ", about {} left")):
        display, _, clock = plain(trials=5, budget_s=budget_s)
        with display:
            display.entry(SEARCH)
            for trial in range(5):
                clock.now += 4
                display.entry(begin(trial))
                if trial < 4:
                    display.entry(end(trial, "stopped"))
            assert display.left() == (0.8, "the last trials run" + most.format("1:20"))
            display.entry(end(4, "stopped"))
            assert display.left() == (1.0, "the last trials run" + most.format("1:20"))
            display.entry({"kind": "again", "trial": 2, "digest": "2"})
            clock.now += 40
            assert display.left() == (0.8, "the last trials run" + most.format("0:40"))
            if budget_s:
                clock.now += 40
                assert display.left() == (1.0, "finishing")


def test_the_nearer_end_counts() -> None:
    display, _, clock = plain(trials=100, budget_s=20.0)
    with display:
        display.entry(SEARCH)
        assert display.left() == (0.0, "0:20 left")
        clock.now += 15
        display.entry(end(1, "stopped"))
        assert display.left() == (0.75, "0:05 left")
        clock.now += 15
        assert display.left() == (1.0, "finishing")
    assert plain(trials=None, budget_s=None)[0].left() is None


def test_workers_begin_and_an_interruption_is_answered() -> None:
    display, _, _ = plain(trials=100, budget_s=20.0)
    display.entry(SEARCH)
    for entry in (result(0, "full", 0.4, 92.8), end(0, "finished")):  # of an earlier session
        display.entry(entry)
    with display:
        display.entry(begin(1))
        assert "1 starting, 0 failed" in display.line()  # its worker may still import torch
        display.entry(result(1, "recalibrate", 0.4, 92.8))
        assert "1 running, 0 failed" in display.line()
        display.interrupt()
        assert display.line().endswith("; interrupted, ending with the best so far")


def test_what_was_spent_before_is_gone() -> None:
    display, _, clock = plain(trials=100, budget_s=100.0)
    display.spent_s = 60.0
    clock.now += 10
    assert display.left() == (0.7, "0:30 left")


# On a terminal.


def test_terminal_shows_the_figures() -> None:
    out, clock = StringIO(), Clock()
    console = Console(file=out, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    with Progress(console, trials=8, budget_s=240.0, clock=clock) as display:
        for entry in (SEARCH, begin(0), begin(1), result(0, "full", 0.4, 92.8)):
            display.entry(entry)
        display.entry(end(1, "failed", "[red]\x1b[2Jno\nmemory"))
        clock.now += 60
    text = out.getvalue()
    assert "recalibrate 0, short 0, full 1" in text
    assert "1 running, 1 failed, 0 over the limit" in text
    assert "2.50 times faster, 0.20 points lost (predicted, within the limits)" in text
    assert "trial 1 failed: [red] [2Jno memory" in text
    assert "3:00 left" in text
    assert "\x1b[2J" not in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor came back


def test_terminal_is_restored_when_the_search_fails() -> None:
    out = StringIO()
    console = Console(file=out, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    with pytest.raises(KeyboardInterrupt), Progress(console, clock=Clock()):
        raise KeyboardInterrupt
    assert out.getvalue().count("\x1b[?25h") == 1


def test_a_narrow_terminal_cuts_and_does_not_wrap() -> None:
    console = Console(file=StringIO(), width=40)
    display = Progress(console, clock=Clock(), teacher=TEACHER, objective=OBJECTIVE, trials=9)
    display.entry(result(0, "full", 0.4, 92.8))
    with console.capture() as captured:
        console.print(display.panel())
    lines = captured.get().splitlines()
    assert len(lines) == 7
    assert lines[3].startswith("│ best     2.50 times faster")
    assert "9 trials to come" in lines[5]


# In the end.


def model(trial: int, metric: float, ms: float) -> dict:
    return {
        "digest": f"{trial:x}" * 64, "metric": metric, "metric_test": metric - 0.3,
        "latency_ms": ms, "latency_spread": 0.01, "size_bytes": 700_000,
        "predicted_latency_ms": [0.9 * ms, 1.02 * ms, 1.1 * ms], "compressed_bytes": 325_000,
    }  # fmt: skip


def ended(**changes) -> dict:
    return {
        "teacher": TEACHER, "objective": OBJECTIVE, "best": "a" * 64, "nearest_miss": None,
        "front": [model(10, 92.7, 0.4), model(11, 92.9, 0.7)], **changes,
    }  # fmt: skip


def closing(result: dict, width: int = 80) -> str:
    console = Console(file=StringIO(), width=width)
    console.print(closing_table(result))
    console.print(closing_sentence(result), markup=False, highlight=False, soft_wrap=True)
    return console.file.getvalue()


def test_closing_table() -> None:
    lines = closing(ended()).splitlines()
    (row,) = [line for line in lines if "aaaaaaaaaa" in line and "│" in line]
    cells = [cell.strip() for cell in row.strip("│ ").split("│")]
    assert cells == ["a" * 10, "2.50", "0.30", "0.40", "0.400", "0.408", "700 kB", "best"]
    (row,) = [line for line in lines if "bbbbbbbbbb" in line and "│" in line]
    assert row.strip("│ ").endswith("outside")  # 1.43 times faster is too slow
    assert any("teacher" in line and "2.80 MB" in line for line in lines)
    assert max(map(len, lines[:-1])) <= 80


def test_closing_sentence_of_the_best() -> None:
    assert closing_sentence(ended()) == (
        "Best: aaaaaaaaaa, 2.50 times faster than the teacher, 0.30 points lost "
        "(0.40 points lost on test), 4.0 times smaller."
    )


def test_closing_says_where_the_best_may_have_been_lucky() -> None:
    best, other = model(10, 92.7, 0.4), model(12, 92.9, 0.45)
    doubtful = best | {"drop_error": 0.3}  # 0.3 lost of 0.5
    sure = {"drop_error": 0.1}
    assert closing_sentence(ended(front=[best | sure, other | sure])).endswith("times smaller.")
    assert closing_sentence(ended(front=[doubtful, other | sure])).endswith(
        "times smaller. It keeps max_drop by less than the standard error of what it lost, 0.30 "
        "points; cccccccccc keeps it by more, 2.22 times faster."
    )
    outside = model(11, 92.9, 0.7) | sure  # too slow
    for front in ([doubtful, other], [doubtful, outside]):
        assert closing_sentence(ended(front=front)).endswith(
            "0.30 points, as does all that keeps it."
        )


def test_closing_names_the_most_accurate_of_those_that_are_as_fast() -> None:
    doubtful, sure = model(10, 92.6, 0.4) | {"drop_error": 0.3}, {"drop_error": 0.01}
    front = [model(12, 92.8, 0.4500) | sure, model(13, 92.9, 0.4501) | sure]
    for order in (front, front[::-1], [*front, model(14, 93.0, 0.48) | sure]):
        assert "; dddddddddd keeps it by more" in closing_sentence(ended(front=[doubtful, *order]))


def test_closing_flags_a_best_that_loses_more_on_test_than_it_may() -> None:
    far = model(10, 92.7, 0.4) | {"metric_test": 92.2}
    assert "(0.60 points lost on test, over max_drop)" in closing_sentence(ended(front=[far]))
    just = model(10, 92.7, 0.4) | {"metric_test": 92.3}
    assert "(0.50 points lost on test)" in closing_sentence(ended(front=[just]))
    assert "over max_drop" not in closing_sentence(ended(front=[far], objective={"speedup": 2.0}))


def test_closing_where_the_compressed_size_is_limited() -> None:
    result = ended(objective={"compressed_bytes": 400_000})
    assert closing_sentence(result).endswith("4.0 times smaller (8.0 times when compressed).")
    table = closing(result)
    assert "compressed" in table
    assert "325 kB" in table
    assert "700 kB" not in table
    missed = ended(objective={"compressed_bytes": 300_000}, best=None, nearest_miss="b" * 64)
    assert closing_sentence(missed).endswith("Missed: 325 kB compressed, the limit is 300 kB.")


def test_closing_sentence_of_the_nearest_miss() -> None:
    sentence = closing_sentence(
        ended(best=None, nearest_miss="b" * 64, objective={"speedup": 3.0, "max_drop": 0.05})
    )
    assert sentence.startswith("Nothing keeps to the limits. Nearest: bbbbbbbbbb, 1.43 times")
    assert sentence.endswith(
        "Missed: 1.43 times faster, the limit is 3; 0.10 points lost, the limit is 0.05."
    )


def test_closing_without_artifact_or_test_data() -> None:
    nothing = closing(ended(front=[], best=None))
    assert "There is no artifact: no trial finished the full rung." in nothing
    teacher = {**TEACHER, "metric_test": None}
    slower = {**model(10, 93.2, 2.0), "metric_test": None, "size_bytes": 5_600_000}
    assert closing_sentence(ended(teacher=teacher, front=[slower])) == (
        "Best: aaaaaaaaaa, 0.50 times as fast as the teacher, 0.20 points gained, 2.0 times larger."
    )


def test_words() -> None:
    assert [lost(drop) for drop in (0.304, -0.1, -1e-12, 0.0, 12.345, 4e7)] == [
        "0.30 points lost", "0.10 points gained", "0.00 points lost", "0.00 points lost",
        "12.35 points lost", "40000000.00 points lost",
    ]  # fmt: skip
    assert [lost(drop) for drop in (0.0042, -0.013, 2.5e-5)] == [  # of a metric of 0 to 1
        "0.0042 points lost", "0.013 points gained", "2.5e-05 points lost",
    ]  # fmt: skip
    assert [metric_value(v) for v in (0.9513, 93.687, -8.97, 0.0, 1.0)] == [  # R2, accuracy
        "0.9513", "93.69", "-8.97", "0.00", "1.00",
    ]  # fmt: skip
    assert (size(999_999), size(1_000_000)) == ("1000 kB", "1.00 MB")
    assert [clock_time(s) for s in (-3, 59.6, 61, 3661)] == ["0:00", "1:00", "1:01", "1:01:01"]
    assert math.isnan(summary(result(1, "short", 0.5, None)).results["short"][f"{1:064x}"].metric)
