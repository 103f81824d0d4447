"""What a trial asks of a node, in Ray's words and in ours."""

from flyweight.search.placement import for_actor, trial_request
from flyweight.search.preflight import lacking
from flyweight.search.spec import Resources


def test_a_trial_asks_for_what_the_spec_says() -> None:
    assert trial_request(Resources()) == {"CPU": 1}
    asked = Resources(cpus=2, gpus=0.25, memory_bytes=8_000_000_000, accelerator="A10G")
    assert trial_request(asked) == {
        "CPU": 2, "GPU": 0.25, "memory": 8e9, "accelerator_type:A10G": 0.001,
    }  # fmt: skip
    assert for_actor(asked) == {
        "num_cpus": 2, "num_gpus": 0.25, "memory": 8e9,
        "resources": {"accelerator_type:A10G": 0.001},
    }  # fmt: skip
    assert for_actor(Resources()) == {
        "num_cpus": 1, "num_gpus": 0, "memory": None, "resources": None
    }  # fmt: skip


def test_what_a_node_lacks_is_told_with_both_versions() -> None:
    own = {"Python": "3.11.7", "ray": "2.60.0", "flyweight": "0.1.0"}
    assert lacking(own, own, seen=True) == []
    other = own | {"Python": "3.10.1", "flyweight": "missing"}
    assert lacking(other, own, seen=True) == [
        "Python is 3.10.1, but 3.11.7 on the driver",
        "flyweight is missing, but 0.1.0 on the driver",
    ]
    (unseen,) = lacking(own, own, seen=False)
    assert "what it writes is not seen here" in unseen
    full = own | {"unwritable": "no space left", "problem": "task: no module named x"}
    assert lacking(full, own, seen=False) == [
        "task: no module named x", "it cannot write what a trial makes: no space left"
    ]  # fmt: skip
