"""The space of legal policies: what it offers, what it makes, what it refuses."""

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from flyweight.spaces import (
    BadInput,
    Capabilities,
    Distill,
    Group,
    Impossible,
    Layer,
    Network,
    Op,
    Parameter,
    Policy,
    Prune,
    Quantize,
    Settings,
    Space,
)
from flyweight.spaces.space import FEW
from flyweight.spaces.tracing import trace

BOTH = ("fp32", "int8")
TARGET = Capabilities({"conv": BOTH, "linear": BOTH}, width_multiple=8)


def network(widths: dict[str, int], multiple_of: int = 1) -> Network:
    """A chain of convolutions, one a group, and a linear layer behind them."""
    ops, layers, before, inputs = (
        [Op("x", "input", "x", (), "", (1, 3, 4, 4), ((None, 3),))],
        {},
        3,
        "x",
    )
    for name, width in widths.items():
        ops.append(Op(name, "conv", "Conv2d", (inputs,), name, (1, width, 4, 4), ((name, width),)))
        layers[name] = Layer(name, "conv", name, before, width, (1, 1), (1, 1), 1, name, 1, 1)
        before, inputs = width, name
    ops.append(Op("head", "linear", "Linear", (inputs,), "head", (1, 2), ((None, 2),)))
    layers["head"] = Layer("head", "linear", "head", before, 2, (), (), 1, None, 1, 1)
    groups = {n: Group(n, w, (n,), multiple_of) for n, w in widths.items()}
    return Network(tuple(ops), layers, groups, ("x",), "head")


WIDE = Settings(
    min_keep=0.25,
    criteria=("l1", "taylor"),
    reconstruct=(True, False),
    calibrations=("minmax", "mse"),
    qat=(True, False),
    losses=("kl", "mse"),
    temperature=(1, 8),
    alpha=(0.1, 1.0),
    learning_rate=(0.001, 0.1),
)
SPACES = {
    "wide": Space(network({"a": 32, "b": 40, "c": 20}), TARGET, WIDE),
    "narrow": Space(network({"a": 32, "b": 64}), TARGET, Settings()),
    "int8 only": Space(network({"a": 32}), TARGET, Settings(precisions=("int8",))),
    "no linear int8": Space(
        network({"a": 32}), Capabilities({"conv": BOTH}), Settings(calibrations=("mse", "minmax"))
    ),
    "grouped": Space(network({"a": 48}, multiple_of=12), TARGET, WIDE),
    "nothing to prune": Space(network({}), TARGET, WIDE),
    "students": Space(
        network({"a": 32, "b": 40}),
        TARGET,
        replace(WIDE, students=("tiny", "pruned"), sparsity=(0.0, 0.5, 0.8)),
        {"tiny": network({"a": 16, "z": 24}), "unused": network({"y": 8})},
    ),
}
spaces = st.sampled_from(list(SPACES.values()))
seeds = st.integers(0, 2**32).map(random.Random)


# -- from values to policies and back ------------------------------------------------------------


@given(spaces, seeds)
def test_values_is_the_inverse_of_policy(space: Space, rng: random.Random) -> None:
    policy = space.sample(rng)
    values = space.values(policy)
    assert space.policy(values) == policy
    assert values.keys() <= space.defaults.keys()
    chosen = {p.name: p.sample(rng) for p in space.parameters}
    back = space.values(space.policy(chosen))
    assert back == {name: chosen[name] for name in back}
    inert = {p.name for p in space.parameters if p.name in chosen.keys() - back.keys()}
    assert inert <= {p.name for p in space.parameters if p.needs or p.student}


@given(spaces, seeds)
def test_a_sample_is_always_contained(space: Space, rng: random.Random) -> None:
    policy = space.sample(rng)
    space.check(policy)
    assert space.contains(policy)
    assert space.contains(Policy.from_json(policy.canonical()))


@given(spaces)
def test_the_defaults_are_contained(space: Space) -> None:
    assert space.contains(space.policy({}))


def test_without_values_nothing_is_compressed() -> None:
    policy = SPACES["wide"].policy({})
    assert not policy.prune.acts
    assert not policy.quantize.acts


def test_the_same_seed_gives_the_same_sample() -> None:
    space = SPACES["wide"]
    assert [space.sample(random.Random(3)).digest for _ in range(2)] == [
        space.sample(random.Random(3)).digest
    ] * 2


def test_the_full_width_is_left_out_of_a_policy() -> None:
    policy = SPACES["wide"].policy({"width/a": 32, "width/b": 16})
    assert policy.prune.width == {"b": 16}


def test_an_unknown_parameter_names_the_nearest() -> None:
    with pytest.raises(BadInput, match=r"no parameter 'width/aa'; did you mean 'width/a'\?"):
        SPACES["wide"].policy({"width/aa": 8})


# -- neighbours ----------------------------------------------------------------------------------


@given(spaces, seeds, st.booleans())
def test_neighbours_are_contained_and_differ_by_one_step(
    space: Space, rng: random.Random, trained: bool
) -> None:
    policy = space.sample(rng)
    if not trained and policy.student == "pruned":
        policy = Policy(policy.prune, policy.quantize)
    before = space.values(policy)
    choices = {p.name: p.choices for p in space.parameters}
    needs = {p.name: p.needs or p.student for p in space.parameters}
    found = list(space.neighbours(policy))
    assert len({p.digest for p in found} - {policy.digest}) == len(found)
    for near in found:
        assert space.contains(near)
        after = space.values(near)
        both = before.keys() & after.keys()
        changed = [name for name in both if before[name] != after[name]]
        assert len(changed) == 1
        options = choices[changed[0]]
        assert abs(options.index(before[changed[0]]) - options.index(after[changed[0]])) == 1
        assert all(needs[name] for name in before.keys() ^ after.keys())  # what became (in)ert


@given(spaces, seeds)
def test_to_be_neighbours_is_mutual_where_nothing_becomes_inert(
    space: Space, rng: random.Random
) -> None:
    policy = space.sample(rng)
    for near in space.neighbours(policy):
        if space.values(near).keys() == space.values(policy).keys():
            assert policy in list(space.neighbours(near))


def test_neighbours_of_a_stranger_are_refused() -> None:
    with pytest.raises(Impossible, match="not in this network: z"):
        list(SPACES["wide"].neighbours(Policy(Prune({"z": 8}))))


# -- membership ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (Policy(Prune({"z": 8})), "not in this network: z"),
        (Policy(quantize=Quantize({"z": "int8"})), "not in this network: z"),
        (Policy(Prune({"a": 9})), r"width/a is one of \(8, 16, 24, 32\), but got 9"),
        (Policy(Prune({"a": 40})), "but got 40"),
        (Policy(Prune({"c": 4})), "but got 4"),
        (Policy(Prune({"a": 8}, "l7")), "criterion is one of .* but got 'l7'"),
        (Policy(quantize=Quantize({"a": "int4"})), "precision/a is one of .* but got 'int4'"),
        (Policy(quantize=Quantize({"a": "int8"}, "entropy")), "calibration is one of"),
        (Policy(distill=Distill(temperature=9)), "1 <= temperature <= 8 must hold, but got 9.0"),
        (Policy(distill=Distill(alpha=0.0)), "<= alpha <="),
        (Policy(distill=Distill(learning_rate=1.0)), "<= learning_rate <="),
        (Policy(distill=Distill(student="tiny")), "student is one of"),
        (Policy(distill=Distill(loss="cosine")), "loss is one of"),
    ],
)
def test_strangers_are_refused_with_the_rule(policy: Policy, says: str) -> None:
    assert not SPACES["wide"].contains(policy)
    with pytest.raises(Impossible, match=says):
        SPACES["wide"].check(policy)


def test_a_space_of_int8_alone_does_not_contain_the_teacher() -> None:
    assert not SPACES["int8 only"].contains(Policy())
    assert SPACES["narrow"].contains(Policy())


# -- widths and precisions -----------------------------------------------------------------------


@given(
    st.integers(1, 300),
    st.floats(0.001, 1),
    st.none() | st.integers(1, 40),
    st.sampled_from((1, 3, 4)),
)
def test_widths_are_multiples_keep_enough_and_end_at_full(
    width: int, min_keep: float, multiple_of: int | None, of_group: int
) -> None:
    width *= of_group
    space = Space(
        network({"a": width}, of_group),
        TARGET,
        Settings(min_keep=min_keep, multiple_of=multiple_of),
    )
    step = math.lcm(multiple_of or 8, of_group)
    if multiple_of is None and width < FEW * step:  # what the target likes is no rule
        step = math.ceil(8 / of_group) * of_group
    widths = space.widths["a"]
    assert list(widths) == sorted(set(widths))
    assert widths[-1] == width
    assert all(w % step == 0 for w in widths[:-1])
    assert all(w >= 1 and w + 1e-6 >= min_keep * width for w in widths)
    missing = [w for w in range(step, width, step) if w not in widths]
    assert all(w < min_keep * width for w in missing)


def test_seven_groups_of_channels_may_lose_some_though_the_target_likes_multiples_of_8() -> None:
    cases = {(56, None): 4, (56, 8): 1, (56, 7): 8, (112, None): 8, (112, 8): 2, (224, None): 4}
    for (width, asked), count in cases.items():
        space = Space(network({"a": width}, 7), TARGET, Settings(min_keep=0.1, multiple_of=asked))
        assert space.widths["a"] == tuple(range(width // count, width + 1, width // count))


def test_a_share_is_not_rounded_up_by_floating_point() -> None:
    space = Space(network({"a": 100}), TARGET, Settings(min_keep=0.07, multiple_of=1))
    assert space.widths["a"][0] == 7


def test_precisions_are_those_that_both_user_and_target_allow() -> None:
    space = SPACES["no linear int8"]
    assert space.precisions == {"a": BOTH, "head": ("fp32",)}
    other = Settings(precisions=("int8", "fp32"))
    assert Space(network({"a": 8}), TARGET, other).precisions["a"] == BOTH  # fp32 first, always
    assert SPACES["int8 only"].precisions == {"a": ("int8",), "head": ("int8",)}


# -- parameters ----------------------------------------------------------------------------------


def test_a_parameter_with_one_choice_stays() -> None:
    parameters = {p.name: p for p in SPACES["narrow"].parameters}
    for name, only in (("criterion", "l1"), ("temperature", 4.0), ("student", "pruned")):
        assert parameters[name].choices == (only,)
        assert parameters[name].default == only
    assert SPACES["narrow"].policy({}).distill == Distill()


def test_ranges_are_parameters_with_their_middle_as_default() -> None:
    parameters = {p.name: p for p in SPACES["wide"].parameters}
    alpha, rate = parameters["alpha"], parameters["learning_rate"]
    assert (alpha.choices, alpha.low, alpha.high, alpha.log) == ((), 0.1, 1.0, False)
    assert alpha.default == pytest.approx(0.55)
    assert rate.log
    assert rate.default == pytest.approx(0.01)


def test_parameters_say_at_which_rung_and_with_what_they_act() -> None:
    parameters = {p.name: p for p in SPACES["wide"].parameters}
    rungs = {name: p.rung for name, p in parameters.items()}
    assert rungs["width/a"] == rungs["precision/head"] == rungs["calibration"] == "recalibrate"
    assert rungs["qat"] == rungs["loss"] == rungs["alpha"] == rungs["learning_rate"] == "short"
    needs = {name: p.needs for name, p in parameters.items() if p.needs}
    assert needs == {
        "criterion": "prune", "reconstruct": "prune", "calibration": "quantize", "qat": "quantize",
    }  # fmt: skip


@given(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3), st.booleans(), seeds)
def test_a_range_is_never_left(one: float, other: float, log: bool, rng: random.Random) -> None:
    low, high = sorted((one, other))
    parameter = Parameter("p", low, (), low, high, log)
    assert all(low <= parameter.sample(rng) <= high for _ in range(20))


# -- size ----------------------------------------------------------------------------------------

TINY = [
    Settings(min_keep=0.5),
    Settings(min_keep=0.5, criteria=("l1", "taylor"), reconstruct=(True, False)),
    Settings(min_keep=0.5, calibrations=("minmax", "mse"), qat=(True, False)),
    Settings(
        min_keep=0.5, criteria=("l1", "median"), calibrations=("minmax", "mse"), losses=("a", "b")
    ),
    Settings(min_keep=0.5, precisions=("int8",), calibrations=("minmax", "mse")),
    Settings(min_keep=0.5, criteria=("l1", "median"), students=("pruned", "tiny")),
    Settings(min_keep=0.5, students=("tiny",), calibrations=("minmax", "mse")),
    Settings(min_keep=0.5, criteria=("l1", "median"), sparsity=(0.0, 0.5, 0.8)),
    Settings(precisions=("fp32",), calibrations=("minmax", "mse")),
]


@pytest.mark.parametrize("settings", TINY)
@pytest.mark.parametrize("target", [TARGET, Capabilities({"linear": BOTH}), Capabilities({})])
def test_size_is_that_of_a_brute_force_enumeration(
    settings: Settings, target: Capabilities
) -> None:
    others = {"tiny": network({"a": 16})}
    space = Space(network({"a": 16, "b": 24}), target, settings, others)
    axes = [p for p in space.parameters if p.choices]
    points = itertools.product(*(p.choices for p in axes))
    names = [p.name for p in axes]
    digests = {space.policy(dict(zip(names, point, strict=True))).digest for point in points}
    assert space.size == len(digests)


# -- students of the task ------------------------------------------------------------------------


def test_groups_and_layers_of_a_student_carry_its_name_and_a_policy_leaves_it_out() -> None:
    space = SPACES["students"]
    names = {p.name: p.student for p in space.parameters}
    assert {n for n, student in names.items() if student == "tiny"} == {
        "width/tiny:a", "width/tiny:z", "precision/tiny:a", "precision/tiny:z",
        "precision/tiny:head",
    }  # fmt: skip
    assert names["width/a"] == names["precision/head"] == "pruned"
    assert next(iter(space.parameters)).name == "student"  # before what depends on it
    values = {"width/tiny:a": 8, "width/a": 24, "precision/tiny:head": "int8"}
    tiny = space.policy(values | {"student": "tiny"})
    assert (tiny.prune.width, tiny.quantize.precision) == ({"a": 8}, {"head": "int8"})
    pruned = space.policy(values | {"student": "pruned"})
    assert (pruned.prune.width, pruned.quantize.precision) == ({"a": 24}, {})


def test_a_policy_names_groups_and_layers_of_its_own_student() -> None:
    space = SPACES["students"]
    tiny = Distill(student="tiny")
    with pytest.raises(Impossible, match="not in this network: b"):
        space.check(Policy(Prune({"b": 16}), distill=tiny))
    with pytest.raises(Impossible, match="not in this network: z"):
        space.check(Policy(Prune({"z": 16})))
    with pytest.raises(Impossible, match=r"student is one of .* but got 'unused'"):
        space.check(Policy(distill=Distill(student="unused")))
    space.check(Policy(Prune({"z": 16}), distill=tiny))
    assert space.uniform(0.5, "int8").student == "tiny"
    assert space.uniform(0.5, "int8").prune.width == {"a": 8, "z": 16}
    assert space.uniform(0.5, student="pruned").prune.width == {"a": 16, "b": 24}


def test_a_student_that_the_task_does_not_name_is_refused() -> None:
    with pytest.raises(BadInput, match="no student 'tiney'; did you mean 'tiny'"):
        Space(network({}), TARGET, Settings(students=("tiney",)), {"tiny": network({})})


# -- the recipe by hand --------------------------------------------------------------------------


def test_uniform_takes_the_nearest_legal_width_and_the_precision_where_it_is_known() -> None:
    space = SPACES["wide"]
    policy = space.uniform(0.5, "int8")
    assert policy.prune.width == {"a": 16, "b": 24, "c": 8}  # 20 and 10 are no multiples of 8
    assert policy.quantize.precision == {n: "int8" for n in ("a", "b", "c", "head")}
    assert space.contains(policy)
    assert SPACES["no linear int8"].uniform(1.0, "int8").quantize.precision == {"a": "int8"}
    assert not space.uniform(1.0).prune.acts
    assert not space.uniform(1.0).quantize.acts
    assert space.uniform(0.0).prune.width == {"a": 8, "b": 16, "c": 8}


@given(spaces, st.floats(0, 1), st.sampled_from(["fp32", "int8"]))
def test_uniform_is_always_contained(space: Space, keep: float, precision: str) -> None:
    assert space.contains(space.uniform(keep, precision))


# -- settings that are no space ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"min_keep": 0}, "0 < min_keep <= 1 must hold, but got 0"),
        ({"min_keep": 1.5}, "0 < min_keep <= 1 must hold, but got 1.5"),
        ({"min_keep": float("nan")}, "min_keep"),
        ({"multiple_of": 0}, "multiple_of is a whole number >= 1 must hold, but got 0"),
        ({"multiple_of": True}, "multiple_of"),
        ({"criteria": ()}, r"criteria has at least one choice must hold, but got \[\]"),
        ({"qat": ()}, "qat has at least one choice"),
        ({"qat": (1,)}, r"every choice of qat is a bool must hold, but got \[1\]"),
        ({"precisions": ("fp32", "fp32")}, "the choices of precisions differ"),
        ({"calibrations": (None,)}, "every choice of calibrations is a str"),
        ({"temperature": (8, 1)}, r"low <= high must hold for temperature, .*\(low=8, high=1\)"),
        ({"learning_rate": (0.1, 0.001)}, r"low <= high must hold for learning_rate"),
        ({"learning_rate": (0.0, 0.1)}, r"learning_rate > 0 must hold, but got \[0.0, 0.1\]"),
        ({"temperature": (-1, 4)}, r"temperature > 0 must hold, but got \[-1, 4\]"),
        ({"alpha": (0.5, 1.5)}, r"0 <= alpha <= 1 must hold, but got \[0.5, 1.5\]"),
        ({"alpha": (float("nan"), 1.0)}, "alpha is finite"),
        ({"temperature": (1, float("inf"))}, "temperature is finite"),
        ({"alpha": (0.5,)}, r"alpha is a range \[low, high\] must hold, but got \[0.5\]"),
    ],
)
def test_settings_that_are_no_space_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        Settings(**settings)


def test_settings_may_come_as_lists() -> None:
    settings = Settings(criteria=["l1", "taylor"], alpha=[0.1, 0.9])  # type: ignore[arg-type]
    assert settings == Settings(criteria=("l1", "taylor"), alpha=(0.1, 0.9))


# -- a real network ------------------------------------------------------------------------------


def test_the_space_of_a_traced_network(
    traced: Callable[[str], Network], capabilities: Capabilities
) -> None:
    space = Space(traced("concat"), capabilities, Settings(min_keep=0.5))
    assert space.widths == {"stem": (8, 16), "left": (16, 24), "right": (8,), "join": (8, 16)}
    assert set(space.precisions) == {"stem", "left", "right", "join", "head"}
    assert space.size == 2 * 2 * 2 * 2**5


@pytest.mark.parametrize("name", ["fused", "inverted", "gated"])
@given(seed=st.integers(0, 2**32), share=st.floats(0, 1))
def test_a_block_that_goes_takes_its_parameters_along(
    name: str, seed: int, share: float, networks: Any
) -> None:
    network = networks.traced(name)
    space = Space(network, TARGET, Settings(min_keep=0.25, multiple_of=1, depth=True))
    policy = space.sample(random.Random(seed))
    assert space.contains(policy)
    assert space.policy(space.values(policy)) == policy
    for block in (network.blocks[n] for n in policy.prune.drop):
        assert not policy.quantize.precision.keys() & set(block.layers)
        assert not policy.prune.width.keys() & set(block.groups)
    assert space.shrunk(policy, 1.0) == policy
    assert space.contains(space.shrunk(policy, share))
    assert space.shrunk(policy, share).prune.drop == policy.prune.drop
    int8 = space.in_int8(policy)
    assert space.contains(int8)
    assert int8.prune == policy.prune
    assert {*int8.quantize.precision} == {*network.without(policy.prune.drop).layers}
    assert all(space.contains(n) for n in space.neighbours(policy))


def test_a_group_that_stays_may_be_called_as_a_layer_that_goes() -> None:
    """What blocks add to an embedding is a group named after the first of them."""

    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.up, self.down = nn.Embedding(9, 8), nn.Linear(8, 16), nn.Linear(16, 8)
            self.last, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, ids: Any) -> Any:
            x = self.words(ids)
            x = x + self.down(torch.relu(self.up(x)))
            return self.head((x + self.last(x)).mean(1))

    network = trace(Stream(), torch.zeros(1, 5, dtype=torch.int64))
    assert network.groups["down"].members == ("down", "last")
    space = Space(network, TARGET, Settings(multiple_of=1, depth=True))
    assert space.contains(Policy(Prune({"down": 4}, drop=("up",))))
    assert not space.contains(Policy(Prune({"up": 4}, drop=("up",))))
    assert all(space.contains(space.sample(random.Random(seed))) for seed in range(30))


def test_a_block_is_dropped_in_some_samples(networks: Any) -> None:
    space = Space(networks.traced("fused"), TARGET, Settings(multiple_of=1, depth=True))
    drops = {space.sample(random.Random(seed)).prune.drop for seed in range(40)}
    assert () in drops
    assert len(drops) > 2


def test_a_block_inside_of_one_that_is_gone_is_no_choice() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.outer, self.inner, self.last = (nn.Linear(8, 8) for _ in range(4))
            self.head = nn.Linear(8, 3)

        def forward(self, x: Any) -> Any:
            x = self.stem(x)
            y = self.outer(x)
            y = y + self.inner(y)
            return self.head(x + self.last(y))

    network = trace(Nested(), torch.rand(1, 8))
    assert set(network.blocks) == {"outer", "inner"}
    space = Space(network, TARGET, Settings(multiple_of=1, depth=True))
    assert space.contains(Policy(Prune(drop=("inner",))))
    assert space.contains(Policy(Prune(drop=("outer",))))
    assert not space.contains(Policy(Prune(drop=("inner", "outer"))))
    assert all(space.contains(space.sample(random.Random(seed))) for seed in range(30))
