"""What a trial asks of a node, in Ray's words and in ours."""

from flyweight.search.placement import for_actor, trial_request
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
