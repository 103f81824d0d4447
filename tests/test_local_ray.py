"""Signals of a search."""

import signal

from flyweight.search.local_ray import terminable


def test_ctrl_c_is_given_back_by_what_takes_it() -> None:
    mine = signal.getsignal(signal.SIGINT)
    with terminable():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as Ray Tune does, with a handler of its own
    assert signal.getsignal(signal.SIGINT) is mine
