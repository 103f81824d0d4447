"""The task: loading it, and every rule it is held to before anything is spent."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import get_default_qat_qconfig
from torch.nn.utils import prune
from torch.utils.data import DataLoader, IterableDataset

from flyweight.compressors import ClassificationTask, Schedule, compress, load_task, prepare
from flyweight.compressors.data import Items, split, stack
from flyweight.compressors.parity import run_module
from flyweight.compressors.task import metric_of
from flyweight.kernels import make_runtime
from flyweight.spaces import BadInput, Policy, Quantize

GOOD = """
from flyweight.compressors import ClassificationTask
class Mine(ClassificationTask):
    def __init__(self, size=3):
        if size < 0:
            raise RuntimeError("size is negative")
        self.size = size
class Other: ...
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "task.py").write_text(GOOD)
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "missing.py").write_text("import no_such_library_at_all\n")
    return tmp_path


def test_a_task_is_loaded_from_its_file(folder: Path) -> None:
    assert load_task("task.py:Mine", folder, {"size": 5}).size == 5


@pytest.mark.parametrize(
    ("reference", "arguments", "message"),
    [
        ("task.py", {}, "'file.py:Name' or 'module:Name', but got 'task.py'"),
        ("tusk.py:Mine", {}, "no file .*tusk.py"),
        ("task.py:Mien", {}, "task.py has no 'Mien'; did you mean 'Mine'"),
        ("task.py:Mine", {"sise": 1}, "does not take task_args .*sise"),
        ("task.py:Mine", {"size": -1}, "cannot be made: RuntimeError: size is negative"),
        ("broken.py:Mine", {}, "broken.py cannot be imported: SyntaxError"),
        ("missing.py:Mine", {}, "cannot be imported: ModuleNotFoundError.*no_such_library"),
        ("no_such_library_at_all:Mine", {}, "module 'no_such_library_at_all' cannot be imported"),
    ],
)
def test_what_cannot_be_loaded_is_named(
    folder: Path, reference: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        load_task(reference, folder, arguments)


class Data(list[Any]):
    """Items in a list."""


def items(count: int = 20) -> Data:
    torch.manual_seed(0)
    return Data((torch.randn(6), i % 3) for i in range(count))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


class Mine(ClassificationTask):
    """A good task; each test breaks one thing."""

    def __init__(self, **broken: Any) -> None:
        super().__init__(model(), items(), items(), items())
        for name, value in broken.items():
            setattr(self, name, value)


class Changing(Data):
    def __getitem__(self, index: Any) -> Any:
        return torch.randn(6), 0


class Failing(Data):
    def __getitem__(self, index: Any) -> Any:
        if index == 7:
            raise KeyError("gone")
        return super().__getitem__(index)


def poisoned(where: int, what: float) -> Data:
    found = items()
    found[where][0][2] = what
    return found


def with_nan() -> nn.Module:
    broken: Any = model()
    with torch.no_grad():
        broken[2].bias[1] = float("nan")
    return broken  # type: ignore[no-any-return]


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).sum(0)  # type: ignore[no-any-return]


def fails(*_: Any) -> Any:
    raise FileNotFoundError("teacher.safetensors")


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(items())


class OfOne(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = model()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.view(1, -1))  # type: ignore[no-any-return]


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(20, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.words(x.long()).mean(1))  # type: ignore[no-any-return]


def sentences(most: int) -> Data:
    return Data((torch.tensor([1.0, i]), i % 3) for i in range(most + 1))


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"model": lambda: "resnet"}, r"model\(\) must be a torch.nn.Module, but got str"),
    ({"model": fails}, r"model\(\) fails: FileNotFoundError: teacher"),
    ({"model": with_nan}, "the model's '2.bias' has values that are NaN or infinite"),
    (
        {"example_input": lambda: torch.rand(1, 6).half()},
        r"example_input\(\) must be in float32, but got torch.float16: give x.float\(\)",
    ),
    (
        {
            "train": Data([(torch.rand(6).bfloat16(), 0)] * 3),
            "example_input": lambda: torch.rand(1, 6),
        },
        r"items of train must be in float32, but got torch.bfloat16: give x.float\(\)",
    ),
    ({"model": Detached}, r"answer to 10 items has shape \(3,\)"),
    ({"example_input": fails}, r"example_input\(\) fails"),
    ({"example_input": lambda: torch.rand(1, 5)}, r"does not run on example_input\(\)"),
    ({"example_input": lambda: torch.rand(1, 6).double()}, r"float32: give x.float\(\)"),
    (
        {"example_input": lambda: torch.rand(6)},
        r"items of train have shape \(6,\), so it has \(1, 6\), but got \(6,\)",
    ),
    ({"train": Data([([0.1] * 6, 0)] * 3)}, "has 1 tensors, but an item of train has 6"),
    ({"train": Data()}, "train is empty"),
    ({"train": items(1)}, "train needs at least 2 items, but has 1"),
    ({"val": items(1)}, "val needs at least 2 items, but has 1"),
    ({"test": Data()}, "test is empty"),
    (
        {"train": poisoned(4, float("nan"))},
        r"train has inputs that are NaN or infinite: items \[4\]; leave such items out, or fill in",
    ),
    (
        {"train": Data((x, math.nan if i == 3 else float(y)) for i, (x, y) in enumerate(items()))},
        r"train has targets that are NaN or infinite: items \[3\]; leave such items out, or mark "
        "what is unknown by a number that loss and metric leave out",
    ),
    ({"val": poisoned(5, float("inf"))}, r"val has inputs that are NaN or infinite: items \[5\]"),
    (
        {"train": Data([(torch.rand(6), 0), (torch.rand(5), 1)])},
        "items of train do not stack: .*; all must be of one shape: pad or crop them",
    ),
    (
        {"val": Data((x.double(), y) for x, y in items())},
        r"does not take items of val .*; items are in float64, .*: give x.float\(\)",
    ),
    ({"train": Data([torch.rand(6)] * 2)}, r"train\[0\] must be a pair .*but is a Tensor"),
    ({"train": Data([(torch.rand(6), "cat")] * 3)}, "targets of train must be tensors or numbers"),
    ({"train": Data([(torch.rand(6), float("nan"))] * 3)}, "train has targets that are NaN"),
    ({"train": Failing(items())}, r"train\[7\] fails: KeyError"),
    ({"train": Changing(items())}, r"train\[0\] gives another item each time; move random"),
    ({"train": Endless()}, "train must be a data set .*of type Endless, which has none; a list"),
    ({"val": iter(items())}, "val must be a data set with a length .*is of type list_iterator"),
    ({"test": DataLoader(items())}, "test is a DataLoader, which gives batches; give its .dataset"),
    ({"val": Data([(torch.rand(4), 0)] * 6)}, "does not take items of val"),
    ({"loss": lambda output, _: output.sum() * float("nan")}, "loss must be one finite number"),
    ({"loss": lambda output, _: output.sum(1)}, "loss must be one finite number, but got"),
    ({"loss": lambda output, _: output.argmax(1).sum()}, "loss cannot be differentiated"),
    ({"loss": fails}, r"task: loss\(output, target\) fails on 10 items of val.*: FileNotFound"),
    ({"metric": fails}, r"task: metric\(output, target\) fails on 10 items of val"),
    ({"metric": lambda *_: float("nan")}, "metric must be one finite number, but got nan"),
    ({"model": lambda: torch.jit.script(model())}, "the model is a TorchScript module"),
    ({"model": lambda: torch.jit.trace(model(), torch.rand(1, 6))}, "was made from"),
    (
        {"model": lambda: nn.Sequential(torch.jit.script(model()), nn.Linear(3, 3))},
        "the model's '0' is a TorchScript module, which cannot be changed",
    ),
    (
        {"model": lambda: nn.Sequential(torch.ao.nn.quantized.dynamic.Linear(6, 3))},
        "the model's '0' is quantized already, or prepared for that .*dynamic.*; give the model in",
    ),
    (
        {"model": lambda: torch.ao.nn.qat.Linear(6, 3, qconfig=get_default_qat_qconfig("x86"))},
        "the model is quantized already, or prepared for that .*qat",
    ),
    (
        {"model": Words, "train": sentences(19), "val": sentences(20), "test": sentences(19)},
        "does not take items of val as .*: index out of range in self$",
    ),
    (
        {
            "model": Words,
            "train": sentences(19),
            "val": Data((x.double(), y) for x, y in sentences(40)),
        },
        "does not take items of val as .*: index out of range in self$",
    ),
    ({"model": OfOne}, r"it takes one item, but not 10 in a batch: .* view\(x.shape\[0\], -1\)"),
    ({"model": lambda: model().half()}, "must be in float32, but '0.weight' is float16"),
    ({"model": lambda: model().double()}, r"is float64; give model\(\).float\(\)"),
    ({"metric": lambda *_: torch.rand(3)}, r"metric must be one finite number, but got tensor"),
    ({"metric": lambda *_: None}, "metric must be one finite number, but got None"),
    ({"metric": lambda *_: "good"}, "metric must be one finite number, but got 'good'"),
    (
        {"val": Data((x, float(y)) for x, y in items())},
        r"task: labels of classes must be whole numbers, but the targets of val are float64: give "
        r"int\(label\)\. loss\(output, target\) fails .* output float32 \[10, 3\], target float64 "
        r"\[10\] of 0 to 2: RuntimeError: expected",
    ),
    (
        {"loss": lambda o, y: nn.functional.binary_cross_entropy(o.sigmoid()[:, 0], y)},
        r"loss takes targets in floats, but those of val are int64: give float\(target\)",
    ),
    (
        {"loss": lambda o, y: nn.functional.binary_cross_entropy(o.sigmoid()[:, 0], y.float())},
        "must lie between 0 and 1, but val has 2",
    ),
    (
        {"val": Data((x, y + 1) for x, y in items())},
        "labels of 3 classes, .* must be 0 to 2, but val has 3: number the labels from 0.*out of b",
    ),
    # One label among many, which would end the search in the middle.
    ({"train": Data([*items(90), (torch.rand(6), 7)])}, "must be 0 to 2, but train has 7"),
    ({"train": Data([*items(90), (torch.rand(6), -1)])}, "must be 0 to 2, but train has -1"),
    ({"val": Data([*items(90), (torch.rand(6), 3)])}, "must be 0 to 2, but val has 3"),
    (
        {"val": Data((x, torch.tensor([y])) for x, y in items())},
        r"in val it is \[1\], beside an answer of \[3\]: for a loss of classes give one number",
    ),
    (
        {"val": Data((x, nn.functional.one_hot(torch.tensor(y), 3)) for x, y in items())},
        r"those of val are int64: give target\.float\(\)",
    ),
    (
        {"loss": nn.functional.binary_cross_entropy_with_logits},
        r"in val it is \[\], beside an answer of \[3\]",
    ),
    (
        {"train": Data([(torch.rand(4), 0)] * 6), "example_input": lambda: torch.rand(1, 6)},
        "does not take items of train",
    ),
]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize(("broken", "message"), BROKEN)
def test_a_broken_task_is_refused_with_the_rule_it_breaks(
    broken: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        prepare(Mine(**broken), make_runtime("onnxruntime", 1), Schedule())


def test_what_accuracy_is_not_of_is_refused() -> None:
    task = Mine()
    with pytest.raises(ValueError, match=r"one score an item .* write metric\(\)"):
        ClassificationTask.metric(task, torch.rand(5, 1), torch.zeros(5))
    with pytest.raises(ValueError, match=r"\[5\], but are \[5, 3\]: of one-hot"):
        ClassificationTask.metric(task, torch.rand(5, 3), torch.zeros(5, 3))
    pixels = torch.rand(5, 3, 2, 2)
    assert ClassificationTask.metric(task, pixels, pixels.argmax(1)) == 100


def test_a_label_that_the_loss_ignores_is_taken() -> None:
    train = Data([*items(), (torch.rand(6), -100)])
    prepare(Mine(train=train), make_runtime("onnxruntime", 1), Schedule())


class Backbone(nn.Module):
    """A module in which another one is compiled."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.compile(nn.Sequential(nn.Linear(6, 16), nn.ReLU()))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))  # type: ignore[no-any-return]


def normed(norm: Any) -> nn.Module:
    made: Any = model()
    norm(made[0])
    made(torch.rand(4, 6))  # spectral norm comes closer at each call in training
    return made  # type: ignore[no-any-return]


def masked_twice(layer: nn.Linear) -> None:
    prune.l1_unstructured(layer, "weight", 0.5)  # type: ignore[no-untyped-call]
    prune.ln_structured(layer, "weight", 2, n=2, dim=0)  # type: ignore[no-untyped-call]
    prune.random_unstructured(layer, "bias", 3)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    "made",
    [
        lambda: nn.DataParallel(model()),
        lambda: torch.compile(model()),
        Backbone,
        lambda: normed(nn.utils.parametrizations.weight_norm),
        lambda: normed(nn.utils.parametrizations.spectral_norm),
        lambda: normed(nn.utils.parametrizations.orthogonal),
        lambda: normed(nn.utils.weight_norm),
        lambda: normed(nn.utils.spectral_norm),
        lambda: normed(masked_twice),
    ],
    ids=[
        "parallel",
        "compiled",
        "inside",
        "weight",
        "spectral",
        "orthogonal",
        "old",
        "older",
        "masked",
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_what_wraps_a_model_or_its_weights_is_taken_off(made: Any) -> None:
    theirs = made()
    task, x = Mine(model=lambda: theirs), torch.stack([x for x, _ in items()])
    kept = {name: value.clone() for name, value in theirs.state_dict().items()}
    found = prepare(task, make_runtime("onnxruntime", 1), Schedule())
    assert len(found.network.groups) == 1
    bare = getattr(theirs, "module", getattr(theirs, "_orig_mod", theirs))
    if isinstance(bare, Backbone):
        bare.body = bare.body._orig_mod
    torch.testing.assert_close(found.teacher(x), bare.eval()(x))
    assert type(found.teacher) is type(bare)
    if theirs is bare:
        assert all(
            torch.equal(value, kept[name])
            for name, value in theirs.state_dict().items()
            if name in kept
        )


class Named(nn.Linear):
    """A linear layer in all but its class: it begins and prints in its own way."""

    def __init__(self, inputs: int, outputs: int, note: str = "mine") -> None:
        super().__init__(inputs, outputs)
        self.note = note

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.describe()}"

    def describe(self) -> str:
        return self.note


class Doubled(nn.Linear):
    """With a forward of its own: what it computes is a layer and a product."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(("kind", "layers"), [(Named, 2), (Doubled, 2)])
def test_a_subclass_of_a_layer_is_one(kind: Any, layers: int) -> None:
    torch.manual_seed(0)
    theirs = nn.Sequential(kind(6, 16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.stack([x for x, _ in items()])
    expected = theirs(x)
    found = prepare(Mine(model=lambda: theirs), make_runtime("onnxruntime", 1), Schedule())
    assert len(found.network.layers) == layers
    assert type(theirs[0]) is kind
    torch.testing.assert_close(found.teacher(x), expected)


def test_a_task_that_lacks_something_is_told_what() -> None:
    class Bare:
        train = val = items()

    bare: Any = Bare()
    with pytest.raises(BadInput, match="Bare has no 'model', which every task needs"):
        prepare(bare, make_runtime("onnxruntime", 1), Schedule())


def test_preparing_leaves_the_users_model_alone() -> None:
    mine = Mine()
    own = mine.model().train()
    before = {k: v.clone() for k, v in own.state_dict().items()}
    found = prepare(mine, make_runtime("onnxruntime", 1), Schedule())
    assert own.training
    assert all(p.requires_grad for p in own.parameters())
    assert all(torch.equal(before[k], v) for k, v in own.state_dict().items())
    assert found.teacher is not own


class Hidden(nn.Module):
    """Attention whose mask, a buffer, hides what comes later."""

    def __init__(self, hidden: float) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(6, 24), nn.Linear(8, 3)
        self.register_buffer("mask", torch.full((4, 4), hidden).triu(1))

    def forward(self, x: Tensor) -> Tensor:  # [N, 4, 6]
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.head(((q @ k.transpose(1, 2) + self.mask).softmax(-1) @ v).mean(1))


@pytest.mark.parametrize("hidden", [float("-inf"), float("nan"), float("inf")])
def test_a_mask_may_hide_with_minus_infinity(hidden: float) -> None:
    data = Data([(torch.rand(4, 6), i % 3) for i in range(40)])
    task = ClassificationTask(Hidden(hidden).eval(), data, data)
    if hidden > 0 or hidden != hidden:
        with pytest.raises(BadInput, match="the model's 'mask' has values that are NaN or infin"):
            prepare(task, make_runtime("onnxruntime", 1), Schedule())
        return
    ready = prepare(task, make_runtime("onnxruntime", 1), Schedule())
    everything = Policy(quantize=Quantize(dict.fromkeys(ready.network.layers, "int8")))
    for policy in (Policy(), everything):
        assert compress(ready, policy, "full").parity is not None


class Rarely(nn.Module):
    """Answers NaN where the first of its inputs is large."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + torch.where(x[:, :1] > 9, -x[:, :1], 1).log()


def test_answers_of_the_model_that_are_not_finite_are_its_own() -> None:
    data = [(torch.rand(6), i % 3) for i in range(100)]
    data[-1][0][0] = 10.0
    good = Data(data[:-1])
    runtime, schedule = make_runtime("onnxruntime", 1), Schedule()
    ready = prepare(ClassificationTask(Rarely().eval(), good, Data(data)), runtime, schedule)
    with pytest.raises(BadInput, match=r"NaN or infinity to 1 of 50 items of val"):
        compress(ready, Policy(), "full")
    ready = prepare(ClassificationTask(Rarely().eval(), Data(data), good), runtime, schedule)
    with pytest.raises(BadInput, match=r"NaN or infinity to 1 of 100 items of train"):
        ready.epoch(0)


def test_a_loss_is_tried_where_students_train() -> None:
    weights = torch.rand(3)  # of the classes, left on the CPU

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output * weights).sum() + target.sum()

    there = torch.device("meta")
    prepare(Mine(loss=loss), make_runtime("onnxruntime", 1), Schedule())
    with pytest.raises(BadInput, match="loss fails on meta, where students train"):
        prepare(Mine(loss=loss), make_runtime("onnxruntime", 1), Schedule(), device=there)


def test_answers_that_are_too_large_are_worked_out_when_they_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = prepare(Mine(), make_runtime("onnxruntime", 1), Schedule())
    index = torch.tensor([3, 7])
    expected = run_module(found.teacher, found.splits.train)[index]
    monkeypatch.setattr("flyweight.compressors.prepared.KEPT", 100)
    assert torch.allclose(found.epoch(0).answers[index], expected)
    assert not found.answers
    monkeypatch.undo()
    assert torch.allclose(found.epoch(0).answers[index], expected)
    assert found.answers.keys() == {0}


def test_the_halves_of_val_are_stratified_and_always_the_same() -> None:
    mine = Mine(val=items(30))
    first, again = split(mine, seed=0), split(mine, seed=1)
    assert torch.equal(first.search.inputs, again.search.inputs)
    assert first.search.targets.bincount().tolist() == [5, 5, 5]
    joined = torch.cat([first.search.inputs, first.selection.inputs])
    assert len(joined.unique(dim=0)) == 30


def test_the_first_items_of_sorted_data_are_of_every_class() -> None:
    found = split(Mine(val=Data(sorted(items(60), key=lambda item: item[1]))))
    for half in (found.search, found.selection):
        assert half.first(12).targets.unique().tolist() == [0, 1, 2]


def test_a_metric_need_not_exist_on_a_few_items() -> None:
    """That of an area under a curve, where classes are rare, does not."""
    few = "Only one class is present"

    def area(_: Tensor, target: Tensor) -> float:
        if len(target) < 25:
            raise ValueError(few)
        return 0.9

    prepare(Mine(val=items(60), metric=area), make_runtime("onnxruntime", 1), Schedule())
    with pytest.raises(BadInput, match=f"fails on 20 items of val.*{few}"):
        prepare(Mine(val=items(40), metric=area), make_runtime("onnxruntime", 1), Schedule())


@pytest.mark.parametrize(
    "kind", [float, torch.tensor, np.float32, np.array, lambda x: np.array([x])]
)
def test_a_metric_may_be_a_number_of_any_library(kind: Any) -> None:
    task = Mine(metric=lambda *_: kind(98.5))
    prepare(task, make_runtime("onnxruntime", 1), Schedule())
    found = metric_of(task, torch.rand(4, 3), torch.zeros(4))
    assert type(found) is float
    assert found == 98.5


def test_numbers_and_scalars_stack() -> None:
    found = stack(Data([(1.5, 2), (2.5, 3)]), "train")
    assert found.inputs.tolist() == [1.5, 2.5]
    assert found.targets.tolist() == [2, 3]


def test_accuracy_is_in_percent() -> None:
    output = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert Mine().metric(output, torch.tensor([0, 1, 1, 0])) == 75.0


@pytest.mark.parametrize(
    ("shape", "sizes"), [((1, 28, 28), [32, 8]), ((3, 224, 224), [8] * 5), ((100_000,), [10] * 4)]
)
def test_items_run_as_many_at_a_time_as_stay_in_the_cache(
    shape: tuple[int, ...], sizes: list[int]
) -> None:
    numbers = torch.arange(40.0).reshape(-1, *[1] * len(shape))
    items = Items({"a": numbers.expand(40, *shape)}, torch.arange(40))
    chunks = list(items.chunks())
    assert [len(c) for c in chunks] == sizes
    assert torch.equal(torch.cat([c.targets for c in chunks]), items.targets)
    assert all((c.inputs["a"].flatten(1)[:, 0] == c.targets).all() for c in chunks)
