"""The next policy to try: one that is within the limits, and priced, found while trials run."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass

from ..spaces import Impossible, Policy
from .limits import Limits
from .strategies import Source

SHRINKS = 16  # steps in which a policy that is over a limit can be made smaller
ASKS = 32  # proposals over a limit, one after another, until the search gives up
# For a policy that is still looked for when the search ends, so that finalists are measured while
# nothing else runs; not for ever, for the target may be away.
CLOSE_S = 60.0

Tell = Callable[[], None]


@dataclass(frozen=True)
class Price:
    """What a policy costs on the target before it is trained. latency_ms: lower, middle, upper."""

    latency_ms: tuple[float, float, float]
    size_bytes: int
    compressed_bytes: int

    def cost(self, limits: Limits) -> float:
        """How far it is over the limits, <= 0 is within: by the upper end of the latency, for what
        is measured alone in the end must still be within."""
        return limits.cost(self.latency_ms[2], self.size_bytes, self.compressed_bytes)


Found = tuple[Policy, Price]


class Finder:
    """Asks the proposals, prices what they say, makes smaller what is over a limit.

    look_ahead: a thread finds the next policy while trials run, so that nobody waits for it. When
    the proposals are asked they know what had come in when the policy before was asked for: that
    does not hang on how long finding it took. reject: is told of each policy that is none, why,
    and its price if it has one. late: says when it is too late to ask for another. All else is
    called from one thread.
    """

    def __init__(
        self,
        proposals: Source,
        price: Callable[[Policy], Price],
        limits: Limits,
        reject: Callable[[Policy, str, Price | None], None],
        late: Callable[[], bool],
        *,
        look_ahead: bool = False,
    ) -> None:
        self._proposals, self._price, self._limits = proposals, price, limits
        self._reject, self._late = reject, late
        self._threaded, self._closed = look_ahead, False
        self._untold: list[Tell] = []  # what the proposals do not know yet
        self._due: list[Tell] | None = None  # and are told before they are asked
        self._ahead: Future[Found | None] | None = None
        self.cut_short = False  # whether the last look ended because it was late

    @property
    def looking(self) -> bool:
        """Whether a policy is looked for, or found and not taken yet."""
        return self._ahead is not None

    def tell(self, what: Tell) -> None:
        """Has the proposals told, when nobody asks them."""
        self._untold.append(what)

    def catch_up(self) -> None:
        """Tells the proposals all that came in, if nobody asks them."""
        if self._ahead is None:
            due, self._due = [*(self._due or ()), *self._take_untold()], None
            for tell in due:
                tell()

    def find(self, wait_s: float | None = None) -> "Future[Found | None] | None":
        """A policy within the limits and its price, found; of None if there seems to be none left,
        of an OSError if nothing can be priced any more, of whatever else was raised. None if it is
        still looked for after ``wait_s`` seconds (without them it is waited for): the next call may
        have it."""
        if self._due is None:  # this one is asked for the first time
            self._due = self._take_untold()
        ahead = self._ahead = self._ahead or self._look()
        if not wait([ahead], wait_s).done:
            return None
        self._ahead = None
        return ahead

    def look_ahead(self) -> None:
        """Begins to look for the next one, where a thread does."""
        if self._threaded:
            self._ahead = self._look()

    def close(self) -> None:
        """Nothing more is looked for. What was found and not taken is told to be none; where it is
        not found in time (a target that is away), nobody asks the proposals again."""
        self._closed = True
        if self._ahead is None or not wait([self._ahead], CLOSE_S).done:
            return
        ahead, self._ahead = self._ahead, None
        if not ahead.exception() and (found := ahead.result()):
            self._proposals.fail(found[0])

    def _look(self) -> "Future[Found | None]":
        """Tells the proposals what is due, then asks them."""
        due, self._due = self._due or [], None
        found: Future[Found | None] = Future()

        def look() -> None:
            try:
                for tell in due:
                    tell()
                found.set_result(self._affordable())
            except BaseException as error:
                found.set_exception(error)

        if self._threaded:  # a daemon: a target that is away must not keep a search from ending
            threading.Thread(target=look, name="flyweight-finder", daemon=True).start()
        else:
            look()
        return found

    def _take_untold(self) -> list[Tell]:
        untold, self._untold = self._untold, []
        return untold

    def _affordable(self) -> Found | None:
        self.cut_short = False
        for _ in range(ASKS):
            self.cut_short = self._closed or self._late()
            policy = None if self.cut_short else self._proposals.ask()
            if policy is None:
                return None
            try:
                price = self.priced(policy)
            except Impossible as error:
                self._proposals.fail(policy)
                self._reject(policy, str(error), None)
                continue
            cost = price.cost(self._limits)
            if cost <= 0:
                return policy, price
            self._proposals.reject(policy, price.latency_ms[1], cost)
            self._reject(policy, "over a limit", price)
            forms = [policy]
            if self._limits.cost(0.0, price.size_bytes, price.compressed_bytes) > 0:
                # In bytes fewer bits count as much as fewer channels; whether they are faster
                # hangs on the target.
                forms.append(self._proposals.space.in_int8(policy))
            smaller = next(filter(None, map(self._smaller, dict.fromkeys(forms))), None)
            if smaller is not None:
                return smaller
        return None

    def priced(self, policy: Policy) -> Price:
        """Its price. Raises Impossible where it has none: also for what nobody foresaw of it, for
        others may have one; OSError if nothing can be priced any more."""
        try:
            return self._price(policy)
        except (Impossible, OSError):
            raise
        except Exception as error:
            raise Impossible(f"{type(error).__name__}: {error}") from error

    def _smaller(self, policy: Policy) -> Found | None:
        """The largest shrunk form of ``policy`` that is within the limits and new."""
        best = None
        low, high = 0, SHRINKS  # within the limits at low / SHRINKS of the width, perhaps
        # Where policies are timed, each takes a while.
        while high - low > 1 and not self._closed and not self._late():
            middle = (low + high) // 2
            tried = self._proposals.space.shrunk(policy, middle / SHRINKS)
            try:
                price = self.priced(tried)
            except Impossible:
                break
            if price.cost(self._limits) <= 0:
                low, best = middle, (tried, price)
            else:
                high = middle
        return best if best and self._proposals.claim(best[0]) else None
