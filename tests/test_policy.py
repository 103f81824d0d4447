"""A policy has one canonical form, one digest, and refuses what it does not know."""

import copy
import dataclasses
import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyweight.spaces import BadInput, Distill, Policy, Prune, Quantize

# The example of the design, as a user may write it.
EXAMPLE = """
{"version": 1,
 "prune": {"criterion": "taylor", "reconstruct": true, "width": {"body.0.c1": 16, "stem.0": 24}},
 "quantize": {"calibration": "mse", "qat": true,
              "precision": {"body.0.c1": "int8", "body.0.c2": "int8"}},
 "distill": {"alpha": 0.9, "learning_rate": 0.02, "loss": "kl", "student": "pruned",
             "temperature": 4.0}}
"""
GOLDEN = {
    "empty": (
        Policy(),
        '{"version":1}',
        "2430f1a2ad2982d0067885488a4c89e21ad1d7c83b115ba8f1b20acc88dfaea8",
    ),
    "example": (
        Policy(
            Prune({"stem.0": 24, "body.0.c1": 16}, "taylor", True),
            Quantize({"body.0.c2": "int8", "body.0.c1": "int8"}, "mse", True),
            Distill("pruned", "kl", 4.0, 0.9, 0.02),
        ),
        '{"distill":{"alpha":0.9,"learning_rate":0.02,"loss":"kl","student":"pruned","t'
        'emperature":4.0},"prune":{"criterion":"taylor","reconstruct":true,"width":{"bo'
        'dy.0.c1":16,"stem.0":24}},"quantize":{"calibration":"mse","precision":{"body.0'
        '.c1":"int8","body.0.c2":"int8"},"qat":true},"version":1}',
        "1a74d822fb8176f93fa80ca838134f328c3718e7d306d3009dd77e02e95643e4",
    ),
    "inert": (
        Policy(Prune({}, "taylor", True), Quantize({"a": "fp32"}, "mse", True)),
        '{"version":1}',
        "2430f1a2ad2982d0067885488a4c89e21ad1d7c83b115ba8f1b20acc88dfaea8",
    ),
    "pruned": (
        Policy(Prune({"stem.0": 24})),
        '{"prune":{"criterion":"l1","reconstruct":false,"width":{"stem.0":24}},"version":1}',
        "301e83b5c8338be8cc571fa5462f7b4228df5fb2acff471d6a199e724deaa01a",
    ),
    "mixed": (
        Policy(quantize=Quantize({"b": "int8", "a": "fp32"}, "percentile")),
        '{"quantize":{"calibration":"percentile","precision":{"b":"int8"},"qat":false},'
        '"version":1}',
        "b597c2208435f9c5764cee6a13db04214f993febe4b435c89afbe3e5789efa4f",
    ),
    "distilled": (
        Policy(distill=Distill(temperature=8, alpha=1, learning_rate=1e-05)),
        '{"distill":{"alpha":1.0,"learning_rate":1e-05,"loss":"kl","student":"pruned","'
        'temperature":8.0},"version":1}',
        "78684141fdcd418dfacfb36221fcef3dff3bfdb3c2ba7e22e18837257a29edc1",
    ),
    "sparse": (
        Policy(Prune({"a": 8}, "median", sparsity=0.5)),
        '{"prune":{"criterion":"median","reconstruct":false,"sparsity":0.5,"width":{"a":8}},'
        '"version":1}',
        "c7e8c24206aab4b4b5016c78251a22ea1098e120f8bcc3af204aa9c179423ee0",
    ),
    "unicode": (
        Policy(Prune({"größe": 8}), distill=Distill(alpha=0.1 + 0.2)),
        '{"distill":{"alpha":0.30000000000000004,"learning_rate":0.02,"loss":"kl","stud'
        'ent":"pruned","temperature":4.0},"prune":{"criterion":"l1","reconstruct":false'
        ',"width":{"gr\\u00f6\\u00dfe":8}},"version":1}',
        "40bd9a19c93795b436d2aba2caa69f9fb73bb9080bacf29d2d018afe9944de14",
    ),
}  # name: (policy, canonical form, digest)


names = st.text(min_size=1, max_size=12)
prunes = st.builds(
    Prune,
    st.dictionaries(names, st.integers(1, 4096), max_size=4),
    st.sampled_from(["l1", "taylor"]),
    st.booleans(),
    st.just(0.0) | st.floats(0, 0.95),
)
quantizes = st.builds(
    Quantize,
    st.dictionaries(names, st.sampled_from(["fp32", "int8"]), max_size=4),
    st.sampled_from(["minmax", "mse"]),
    st.booleans(),
)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
distills = st.builds(
    Distill,
    st.just("pruned"),
    st.just("kl"),
    positive,
    st.floats(0, 1),
    positive,
)
policies = st.builds(Policy, prunes, quantizes, st.none() | distills)


@pytest.mark.parametrize("name", GOLDEN)
def test_a_policy_keeps_its_canonical_form_and_digest_for_ever(name: str) -> None:
    policy, canonical, digest = GOLDEN[name]
    assert policy.canonical() == canonical
    assert policy.digest == digest
    assert Policy.from_json(canonical) == policy


def test_the_design_example_is_read_as_written() -> None:
    assert Policy.from_json(EXAMPLE) == GOLDEN["example"][0]
    assert Policy.from_json(EXAMPLE).to_dict() == json.loads(EXAMPLE)


@given(policies)
def test_a_policy_round_trips(policy: Policy) -> None:
    for twin in (
        Policy.from_json(policy.canonical()),
        Policy.from_dict(policy.to_dict()),
        Policy.from_json(json.dumps(policy.to_dict(), indent=3)),
        pickle.loads(pickle.dumps(policy)),
        copy.deepcopy(policy),
    ):
        assert twin == policy
        assert hash(twin) == hash(policy)
        assert twin.digest == policy.digest
        assert (twin.prune, twin.quantize, twin.distill) == (
            policy.prune, policy.quantize, policy.distill,
        )  # fmt: skip


@given(policies)
def test_parts_hash_and_pickle_alone(policy: Policy) -> None:
    for part in (policy.prune, policy.quantize, policy.distill):
        twin = pickle.loads(pickle.dumps(part))
        assert twin == part
        assert hash(twin) == hash(part)


@given(policies)
def test_the_canonical_form_is_sorted_and_without_spaces(policy: Policy) -> None:
    text = policy.canonical()
    values = json.loads(text)
    assert text == json.dumps(values, sort_keys=True, separators=(",", ":"))
    assert text.isascii()


@given(policies, st.randoms(use_true_random=False))
def test_the_order_of_keys_does_not_matter(policy: Policy, rng: Any) -> None:
    def shuffled(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        items = list(value.items())
        rng.shuffle(items)
        return {key: shuffled(inner) for key, inner in items}

    assert Policy.from_dict(shuffled(policy.to_dict())).digest == policy.digest


@given(policies, policies)
def test_policies_are_equal_exactly_when_their_digests_are(one: Policy, other: Policy) -> None:
    assert (one == other) == (one.digest == other.digest)
    if one == other:
        assert hash(one) == hash(other)


def test_a_policy_is_equal_to_nothing_else() -> None:
    assert Policy() != Policy().canonical()
    assert len({Policy(), Policy(), Policy(distill=Distill())}) == 2


@pytest.mark.parametrize(
    ("inert", "plain"),
    [
        (Policy(Prune({}, "taylor", True)), Policy()),
        (Policy(Prune({"a": 8}, sparsity=0)), Policy(Prune({"a": 8}))),
        (Policy(Prune({}, "taylor", True, 0.5)), Policy(Prune(sparsity=0.5))),
        (Policy(quantize=Quantize({}, "mse", True)), Policy()),
        (Policy(quantize=Quantize({"a": "fp32"}, "mse", True)), Policy()),
        (
            Policy(quantize=Quantize({"a": "fp32", "b": "int8"})),
            Policy(quantize=Quantize({"b": "int8"})),
        ),
        (Policy(distill=Distill(alpha=1)), Policy(distill=Distill(alpha=1.0))),
        (Policy(distill=Distill(alpha=-0.0)), Policy(distill=Distill(alpha=0.0))),
    ],
)
def test_what_does_nothing_is_no_part_of_a_policy(inert: Policy, plain: Policy) -> None:
    assert inert == plain
    assert inert.digest == plain.digest
    assert (inert.prune, inert.quantize, inert.distill) == (
        plain.prune, plain.quantize, plain.distill,
    )  # fmt: skip


@pytest.mark.parametrize("part", ["prune", "quantize", "distill"])
def test_an_empty_object_is_as_good_as_none(part: str) -> None:
    assert Policy.from_dict({"version": 1, part: {}}) == Policy()


def test_an_int_where_a_float_belongs_gives_the_same_digest() -> None:
    texts = [f'{{"version":1,"distill":{{"alpha":{a},"temperature":{t}}}}}'
             for a, t in (("1", "8"), ("1.0", "8.0"), ("1.00", "0.8e1"))]  # fmt: skip
    assert len({Policy.from_json(text).digest for text in texts}) == 1
    assert '"alpha":1.0,' in Policy.from_json(texts[0]).canonical()


@given(positive)
def test_floats_are_the_shortest_that_round_trip(value: float) -> None:
    policy = Policy(distill=Distill(temperature=value))
    assert f'"temperature":{value!r}' in policy.canonical()
    assert Policy.from_json(policy.canonical()).distill == policy.distill


def test_nothing_of_a_policy_can_be_changed() -> None:
    widths = {"a": 8}
    policy = Policy(Prune(widths), Quantize({"a": "int8"}), Distill())
    digest = policy.digest
    widths["a"] = 16  # the caller's own
    for target, name in ((policy, "prune"), (policy.prune, "width"), (policy.distill, "alpha")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(target, name, None)
    for mapping in (policy.prune.width, policy.quantize.precision):
        with pytest.raises(TypeError):
            mapping["a"] = 1  # type: ignore[index]
    policy.to_dict()["prune"]["width"]["a"] = 1
    assert policy.digest == digest


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"prun": {}}, r"unknown key 'prun'; did you mean 'prune'\?"),
        ({"quantise": {}}, r"unknown key 'quantise'; did you mean 'quantize'\?"),
        ({"zzz": {}}, r"unknown key 'zzz'; known: distill, prune, quantize"),
        ({7: {}}, r"unknown key 7"),
        ({"prune": {"widths": {"a": 8}}}, r"unknown key prune.widths; did you mean 'width'\?"),
        ({"quantize": {"precison": {}}}, r"quantize.precison; did you mean 'precision'\?"),
        ({"distill": {"temprature": 1}}, r"distill.temprature; did you mean 'temperature'\?"),
        ({"prune": {"width": {"a": 0}}}, r"prune.width\['a'\] is a whole number >= 1 .* got 0"),
        ({"prune": {"width": {"a": -8}}}, r"got -8"),
        ({"prune": {"width": {"a": 8.0}}}, r"got 8.0"),
        ({"prune": {"width": {"a": True}}}, r"got True"),
        ({"prune": {"width": {"a": "8"}}}, r"got '8'"),
        ({"prune": {"width": {1: 8}}}, r"every key of prune.width is a name .* got 1"),
        ({"prune": {"width": [8]}}, r"prune.width is an object .* got \[8\]"),
        ({"prune": {"criterion": 1, "width": {"a": 8}}}, r"prune.criterion is a name"),
        ({"prune": {"reconstruct": 1, "width": {"a": 8}}}, r"reconstruct is true or false"),
        ({"prune": {"sparsity": 1}}, r"0 <= prune.sparsity <= 0.95 must hold, but got 1"),
        ({"prune": {"sparsity": -0.1}}, r"0 <= prune.sparsity <= 0.95 must hold, but got -0.1"),
        ({"prune": {"sparsity": True}}, r"prune.sparsity <= 0.95 must hold, but got True"),
        ({"prune": None}, r"prune is an object, but got None"),
        ({"prune": [1]}, r"prune is an object, but got \[1\]"),
        ({"quantize": {"precision": "int8"}}, r"quantize.precision is an object"),
        ({"quantize": {"precision": {"a": 8}}}, r"quantize.precision\['a'\] is a name .* got 8"),
        ({"quantize": {"calibration": None}}, r"quantize.calibration is a name"),
        ({"quantize": {"qat": "yes"}}, r"quantize.qat is true or false .* got 'yes'"),
        ({"distill": {"temperature": 0}}, r"distill.temperature > 0 must hold, but got 0.0"),
        ({"distill": {"temperature": -1.5}}, r"got -1.5"),
        ({"distill": {"alpha": 1.1}}, r"0 <= distill.alpha <= 1 must hold, but got 1.1"),
        ({"distill": {"alpha": -0.1}}, r"got -0.1"),
        ({"distill": {"alpha": True}}, r"distill.alpha is a finite number .* got True"),
        ({"distill": {"alpha": "0.5"}}, r"got '0.5'"),
        ({"distill": {"learning_rate": 0}}, r"distill.learning_rate > 0"),
        ({"distill": {"learning_rate": float("nan")}}, r"learning_rate is a finite number .* nan"),
        ({"distill": {"temperature": float("inf")}}, r"temperature is a finite number .* inf"),
        ({"distill": {"temperature": 10**400}}, r"temperature is a finite number"),
        ({"distill": {"student": 1}}, r"distill.student is a name"),
        ({"distill": {"loss": None}}, r"distill.loss is a name"),
    ],
)
def test_bad_input_is_refused_with_the_rule_and_the_value(
    values: dict[Any, Any], says: str
) -> None:
    with pytest.raises(BadInput, match=says):
        Policy.from_dict({"version": 1, **values})


@pytest.mark.parametrize("version", [None, 0, 2, "1", True, 1.0])
def test_the_version_must_be_known(version: object) -> None:
    with pytest.raises(BadInput, match="version 1 is needed, but got"):
        Policy.from_dict({"version": version})


def test_the_version_must_be_there() -> None:
    with pytest.raises(BadInput, match="version 1 is needed, but got None"):
        Policy.from_dict({})


@pytest.mark.parametrize("text", ["", "{", "nul", '{"version":1,}'])
def test_what_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="policy: not JSON"):
        Policy.from_json(text)


@pytest.mark.parametrize("text", ["[]", "1", "null", '"x"'])
def test_json_that_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="an object is needed"):
        Policy.from_json(text)


def test_json_with_nan_or_infinity_is_refused() -> None:
    for number in ("NaN", "Infinity", "-Infinity", "1e999"):
        with pytest.raises(BadInput, match="finite number"):
            Policy.from_json(f'{{"version":1,"distill":{{"alpha":{number}}}}}')


def test_parts_of_another_type_are_a_programming_error() -> None:
    with pytest.raises(TypeError, match="prune must be a Prune"):
        Policy(prune={"width": {}})  # type: ignore[arg-type]
