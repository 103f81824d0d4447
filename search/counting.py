"""What is said of work that takes a while: a bar on a terminal, else a line every few seconds."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .words import clock_time

# Seconds of silence at most where there is no bar; of long work this share of the time gone.
LINE_S, LINE_SHARE = 5.0, 0.05
LOOK_S = 0.5  # between two looks whether it was silent for so long


class Ticker:
    """Calls ``tell`` from a thread of its own whenever nothing was said for a while; a context
    manager."""

    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell = tell
        self._began = self._last = time.monotonic()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def said(self) -> None:
        """Something was said just now."""
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        self._began = self._last = time.monotonic()
        self._over.clear()
        self._thread = threading.Thread(target=self._run, name="flyweight-ticker", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(LOOK_S):
            now = time.monotonic()
            if now - self._last >= max(LINE_S, LINE_SHARE * (now - self._began)):
                self._tell()
                self.said()


@contextmanager
def counting(
    text: str, total: int | None, console: Console | None
) -> Iterator[Callable[[int], None]]:
    """Shows ``text`` with the number that the yielded function is told last; total: None where it
    is not known. console: None to show nothing."""
    if console is not None and not has_bars(console):
        done = [0]

        def line() -> str:
            return f"{text}: {done[0]}" + ("" if total is None else f" of {total}")

        def told(count: int) -> None:
            done[0] = count

        with _telling(line, console):
            yield told
        return
    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=console is None) as progress:
        bar = progress.add_task("", total=total)
        yield lambda count: progress.update(bar, completed=count)


@contextmanager
def telling(text: str, console: Console | None) -> Iterator[None]:
    """Says ``text``, and where no terminal shows it, that it still goes on."""
    if console is None:
        print(text)
        yield
        return
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    if has_bars(console):
        yield
        return
    with _telling(lambda: text, console, last=False):
        yield


def has_bars(console: Console) -> bool:
    """Whether what was shown can be drawn over."""
    return console.is_terminal and not console.is_dumb_terminal


@contextmanager
def _telling(line: Callable[[], str], console: Console, last: bool = True) -> Iterator[None]:
    """Prints ``line()`` with the time gone every few seconds, and in the end if ``last``."""
    began = time.monotonic()

    def tell() -> None:
        gone = clock_time(time.monotonic() - began)
        console.print(f"{line()}, {gone}", markup=False, highlight=False, soft_wrap=True)

    with Ticker(tell):
        yield
    if last:
        tell()
