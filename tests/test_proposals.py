"""Proposals: never twice, fidelities apart, nothing left open."""

from typing import Any

import pytest

from flyweight.compressors import RUNGS
from flyweight.search.proposals import ENOUGH, Proposals
from flyweight.spaces import Capabilities, Group, Layer, Network, Op, Policy, Settings, Space

BOTH = ("fp32", "int8")


def space(widths: dict[str, int] | None = None, **changes: Any) -> Space:
    """A chain of convolutions."""
    widths = {"a": 32, "b": 64} if widths is None else widths
    ops = [Op("x", "input", "x", (), "", (1, 3, 4, 4), ((None, 3),))]
    layers, before, inputs = {}, 3, "x"
    for name, width in widths.items():
        ops.append(Op(name, "conv", "Conv2d", (inputs,), name, (1, width, 4, 4), ((name, width),)))
        layers[name] = Layer(name, "conv", name, before, width, (1, 1), (1, 1), 1, name, 1, 1)
        before, inputs = width, name
    groups = {n: Group(n, w, (n,), 1) for n, w in widths.items()}
    network = Network(tuple(ops), layers, groups, ("x",), inputs)
    target = Capabilities({"conv": BOTH, "linear": BOTH}, width_multiple=8)
    return Space(network, target, Settings(**{"min_keep": 0.125, "qat": (True, False)} | changes))


ONE: dict[str, Any] = {
    "min_keep": 1.0, "precisions": ("fp32",), "criteria": ("l1",), "reconstruct": (False,),
    "calibrations": ("minmax",), "qat": (False,), "losses": ("kl",), "temperature": (4.0, 4.0),
    "alpha": (0.9, 0.9), "learning_rate": (0.02, 0.02),
}  # fmt: skip


def loss(policy: Policy) -> float:
    return sum(1 / w for w in policy.prune.width.values()) + len(policy.quantize.precision) / 100


def climb(proposals: Proposals, policy: Policy, rungs: int) -> None:
    for rung in RUNGS[:rungs]:
        proposals.tell(policy, rung, loss(policy), 1.0, -0.5)
    proposals.fail(policy)


def drive(proposals: Proposals, count: int) -> list[Policy]:
    found = []
    for number in range(count):
        policy = proposals.ask()
        assert policy is not None
        found.append(policy)
        climb(proposals, policy, 1 + number % 3)
    return found


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_never_twice_always_legal_nothing_open(sampler: str) -> None:
    place = space()
    proposals = Proposals(place, sampler)
    found = drive(proposals, 45)
    assert len({p.digest for p in found}) == 45
    assert all(place.contains(p) for p in found)
    assert proposals.running() == 0


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_seed_decides(sampler: str) -> None:
    one, same, other = (drive(Proposals(space(), sampler, s), 30) for s in (7, 7, 8))
    assert one == same
    assert one != other


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_every_seed_of_32_bits_is_one(sampler: str) -> None:
    assert len(drive(Proposals(space(), sampler, 2**32 - 1), 12)) == 12


def test_fidelities_are_never_mixed() -> None:
    proposals = Proposals(space())
    drive(proposals, 45)
    counts = [len(proposals._completed(r)) for r in RUNGS]
    assert counts == [45, 30, 15]


def test_many_asked_at_once_and_failed() -> None:
    proposals = Proposals(space())
    asked = [proposals.ask() for _ in range(8)]
    assert proposals.running() == 8
    for policy in asked:
        assert policy is not None
        proposals.fail(policy)
        proposals.fail(policy)
    assert proposals.running() == 0


def test_a_rejected_policy_is_told_once() -> None:
    proposals = Proposals(space())
    for _ in range(3 * ENOUGH):
        policy = proposals.ask()
        assert policy is not None
        proposals.reject(policy, 9.0, 1.0)
        proposals.reject(policy, 9.0, 1.0)
        proposals.fail(policy)
    assert proposals.running() == 0
    assert len(proposals._completed(RUNGS[0])) == 3 * ENOUGH


def test_the_first_policies_come_first_and_once() -> None:
    place = space()
    first = [place.uniform(1.0), place.uniform(0.5), place.uniform(0.5), place.uniform(0.5, "int8")]
    proposals = Proposals(place, first=first)
    assert [proposals.ask() for _ in range(3)] == list(dict.fromkeys(first))
    assert proposals.ask() not in first


def test_results_of_an_earlier_session_are_known() -> None:
    earlier = drive(Proposals(space()), 30)
    resumed = Proposals(space())
    for number, policy in enumerate(earlier):
        climb(resumed, policy, 1 + number % 3)
    assert [len(resumed._completed(r)) for r in RUNGS] == [30, 20, 10]
    assert not {p.digest for p in drive(resumed, 20)} & {p.digest for p in earlier}


def test_results_of_a_wider_space_count_as_seen_and_teach_nothing() -> None:
    narrow = Proposals(space(min_keep=0.5))
    policy = space().uniform(0.125)
    climb(narrow, policy, 3)
    assert not narrow.claim(policy)
    assert not narrow._completed(RUNGS[0])


def test_a_space_of_one_policy_is_exhausted_after_it() -> None:
    proposals = Proposals(space({"a": 8}, **ONE))
    policy = proposals.ask()
    assert policy is not None
    climb(proposals, policy, 3)
    assert proposals.ask() is None
    assert proposals.ask() is None
    assert proposals.running() == 0


def test_a_small_space_is_searched_whole() -> None:
    place = space({"a": 32}, **ONE | {"min_keep": 0.25, "precisions": BOTH})
    proposals = Proposals(place)
    found = []
    while (policy := proposals.ask()) is not None:
        found.append(policy.digest)
        climb(proposals, policy, 3)
    assert len(found) == len(set(found)) >= 6
    assert proposals.running() == 0


def test_a_resumed_queue_is_gone_through_to_its_end() -> None:
    place = space()
    first = [place.uniform(k / 40) for k in range(5, 41)]
    first = list(dict.fromkeys(first))
    proposals = Proposals(place, None, first=first)
    for policy in first[:-1]:
        proposals.claim(policy)
    assert proposals.ask() == first[-1]
    assert proposals.ask() is None


def test_results_of_a_student_that_is_no_longer_allowed_teach_nothing() -> None:
    proposals = Proposals(space())
    other = Policy.from_dict({"version": 1, "distill": {"student": "small"}})
    proposals.tell(other, "full", 0.1, 1.0, -1.0)
    assert drive(proposals, 12)
