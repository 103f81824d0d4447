"""search.yaml: read, validated, resolved. Every error names the key, the rule and the value."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from ..kernels import RUNTIMES
from ..spaces import BadInput, Settings, nearest
from ..spaces.policy import MAX_SPARSITY
from .live import LiveTask
from .run_files import SPEC
from .tracking import redact

STARTER = "search.yaml"  # what `flyweight init` calls it
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def seconds(value: object) -> object:
    """ "90s", "4m", "1h" or a number of seconds, in seconds."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9.]+)\s*([smhd])\s*", value)
        if not match:
            raise ValueError("is a duration such as 90s, 4m or 1h")
        return float(match[1]) * UNITS[match[2]]
    return value


def _bounds(value: object) -> object:
    return [value, value] if isinstance(value, int | float) else value


def _names(known: Any) -> BeforeValidator:
    def check(values: object) -> object:
        for value in values if isinstance(values, list) else [values]:
            if value not in known:
                raise ValueError(f"has {value!r}; {nearest(str(value), map(str, known))}")
        return values

    return BeforeValidator(check)


_KINDS = {  # pydantic's word for what is wanted: ours
    "int": "a whole number", "float": "a number", "finite": "a finite number",
    "bool": "true or false", "string": "text", "tuple": "a list", "dict": "keys with values",
    "model": "keys with values",
}  # fmt: skip
Duration = Annotated[float, BeforeValidator(seconds), Field(gt=0)]
Range = Annotated[tuple[float, float], BeforeValidator(_bounds)]
Sparsity = Annotated[float, Field(ge=0, le=MAX_SPARSITY)]
Choices = Annotated[tuple[bool, ...], Field(min_length=1)]
Names = Annotated[tuple[str, ...], Field(min_length=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Target(Section):
    runtime: str = "onnxruntime"
    threads: int = Field(1, ge=1)
    batch_size: int = Field(1, ge=1)
    profile: str | None = None  # a device profile; without one a long search makes its own

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.runtime not in RUNTIMES:
            raise ValueError(f"runtime: no {self.runtime!r}; {nearest(self.runtime, RUNTIMES)}")
        return self


class Objective(Section):
    """The limits. speedup: times faster than the teacher. max_drop: points of the metric.
    size_bytes: of the artifact as it is deployed. compressed_bytes: of it when packed, see
    ``compressed_bytes`` in store.py: what zeros bring."""

    speedup: float | None = Field(None, gt=0)
    latency_ms: float | None = Field(None, gt=0)
    max_drop: float | None = Field(None, ge=0)
    size_bytes: int | None = Field(None, gt=0)
    compressed_bytes: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.speedup is not None and self.latency_ms is not None:
            raise ValueError("give speedup or latency_ms, not both")
        if not self.model_dump(exclude_none=True):
            raise ValueError(f"give at least one of {', '.join(type(self).model_fields)}")
        return self


class Prune(Section):
    min_keep: float = Field(0.125, gt=0, le=1)
    multiple_of: int | None = Field(None, ge=1)
    criteria: Names = ("l1", "taylor")
    reconstruct: Choices = (True, False)
    sparsity: Annotated[tuple[Sparsity, ...], Field(min_length=1)] = (0.0,)
    depth: bool = False


class Quantize(Section):
    precisions: Annotated[Names, _names(("fp32", "int8"))] = ("fp32", "int8")
    calibrations: Names = ("minmax", "percentile", "mse")
    qat: Choices = (False, True)


class Distill(Section):
    # "pruned", or one that the task's students() names
    students: Names = ("pruned",)
    losses: Names = ("kl",)
    temperature: Range = (1.0, 8.0)
    alpha: Range = (0.1, 1.0)
    learning_rate: Range = (0.001, 0.1)

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for name, least in (("temperature", 1e-3), ("alpha", 0.0), ("learning_rate", 1e-9)):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(
                    f"{name}: low <= high must hold, but got low={low:g}, high={high:g}"
                )
            if low < least:
                raise ValueError(f"{name}: low >= {least:g} must hold, but got {low:g}")
        if self.alpha[1] > 1:
            raise ValueError(f"alpha: high <= 1 must hold, but got {self.alpha[1]:g}")
        return self


class SpaceSection(Section):
    prune: Prune = Prune()
    quantize: Quantize = Quantize()
    distill: Distill = Distill()

    def settings(self) -> Settings:
        """The same in the words of ``flyweight.spaces``."""
        p, q, d = self.prune, self.quantize, self.distill
        return Settings(
            min_keep=p.min_keep, multiple_of=p.multiple_of, criteria=p.criteria,
            reconstruct=p.reconstruct, sparsity=p.sparsity, depth=p.depth, precisions=q.precisions,
            calibrations=q.calibrations, qat=q.qat, students=d.students, losses=d.losses,
            temperature=d.temperature, alpha=d.alpha, learning_rate=d.learning_rate,
        )  # fmt: skip


class Search(Section):
    """time_budget: seconds for all that comes between timing the teacher and measuring finalists,
    the device profile and the sensitivity table as well as the trials."""

    strategy: Literal["joint", "sequential", "uniform", "solver", "random"] = "joint"
    trials: int = Field(64, ge=1)
    time_budget: Duration | None = None
    concurrency: int = Field(2, ge=1)
    seed: int = Field(0, ge=0, lt=2**32)  # what numpy and torch take
    sampler: Literal["tpe", "random"] = "tpe"


class Rungs(Section):
    short: float = Field(0.1, gt=0, lt=1)
    full_epochs: float = Field(2.0, gt=0)


class Resources(Section):
    """What each trial asks of a node. gpus: may be a fraction. accelerator: Ray's name of a type of
    GPU, "A10G"."""

    cpus: float = Field(1, gt=0)
    gpus: float = Field(0, ge=0)
    memory_bytes: int | None = Field(None, gt=0)
    accelerator: str | None = None


class Tracking(Section):
    uri: str = "sqlite:///mlflow.db"
    experiment: str = Field("flyweight", min_length=1)


class Spec(Section):
    """A search, as search.yaml describes it. ``folder``: what relative paths are relative to."""

    task: str
    task_args: dict[str, Any] = {}
    target: Target = Target()
    objective: Objective
    space: SpaceSection = SpaceSection()
    search: Search = Search()
    rungs: Rungs = Rungs()
    resources: Resources = Resources()
    storage: str | None = None
    tracking: Tracking | None = Tracking()
    folder: Path = Field(default=Path(), exclude=True)
    _given: str = PrivateAttr("")
    _live: LiveTask | None = PrivateAttr(None)

    @property
    def given_task(self) -> str:
        """The task as the file says it; ``task`` says where that is on this machine."""
        return self._given or self.task

    def with_task(self, live: LiveTask) -> Self:
        """The same for a task that no file has."""
        out = self.model_copy()
        out._live = live
        return out

    @contextlib.contextmanager
    def loaded_task(self) -> Iterator[Any]:
        """The task, whose own folder is the working directory as long as it is made and read: the
        same relative paths lead to the same files here and in workers, which Ray runs elsewhere.
        Raises BadInput."""
        from ..compressors.task import load_task, task_folder  # with torch

        place = self.folder if self._live else task_folder(self.task, self.folder)
        # It may not be there: a task of a notebook travels without it, and a file may be missing.
        with contextlib.chdir(place) if place.is_dir() else contextlib.nullcontext():
            yield (
                self._live.load()
                if self._live
                else load_task(self.task, self.folder, self.task_args)
            )

    def to_yaml(self) -> str:
        """The spec with every default written out and no secrets: what a run directory keeps."""
        values = self.model_dump(mode="json")
        if self.tracking is not None:
            values["tracking"]["uri"] = redact(self.tracking.uri, self.tracking.uri)
        if self.storage is not None:
            values["storage"] = redact(self.storage, self.storage)
        return yaml.safe_dump(values, sort_keys=False)


def spec_file(path: Path) -> Path:
    """The spec at ``path``: the file itself, or that of a folder, of a run say. Raises BadInput."""
    if not path.is_dir():
        return path
    for name in (STARTER, SPEC):
        if (path / name).is_file():
            return path / name
    raise BadInput(
        f"{path} is a folder without a {STARTER} or, of a run, a {SPEC}; name the file, or let "
        "`flyweight init DIR` write a starter"
    )


def load_spec(path: Path) -> Spec:
    """The spec in ``path``, with paths made absolute. Raises BadInput."""
    path = spec_file(path)
    if path.suffix == ".py":
        raise BadInput(
            f"{path} is Python, but a search.yaml is expected, which names the task in it; "
            "`flyweight init DIR` writes both"
        )
    if not path.is_file():
        raise BadInput(f"no spec at {path}; `flyweight init DIR` writes a starter")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise BadInput(f"{path} must hold keys and values, but holds {type(values).__name__}")
    return make_spec(values, path.resolve().parent, str(path))


def make_spec(values: dict[str, Any], folder: Path, source: str) -> Spec:
    """The spec of these ``values``, paths being relative to ``folder``. Raises BadInput, which
    begins with ``source``."""
    if "folder" in values:
        raise BadInput(f"{source}: unknown key 'folder'")
    try:
        spec = Spec(**values, folder=folder)
    except ValidationError as error:
        raise BadInput(f"{source}:\n" + "\n".join(_explain(e) for e in error.errors())) from None
    except TypeError as error:
        raise BadInput(f"{source}: {error}") from error
    _check_techniques(spec.space, source)
    resolved = spec.model_copy(update=_absolute(spec, folder))
    resolved._given = spec.task
    return resolved


def _check_techniques(space: SpaceSection, source: str) -> None:
    """Raises BadInput for a name that ``compressors`` does not know. Last of all: they import
    torch, which takes seconds, and what is wrong otherwise is told at once."""
    from ..compressors.distill import LOSSES
    from ..compressors.observe import ACTIVATION_RANGES
    from ..compressors.prune import CRITERIA

    for key, given, known in (
        ("prune.criteria", space.prune.criteria, CRITERIA),
        ("quantize.calibrations", space.quantize.calibrations, ACTIVATION_RANGES),
        ("distill.losses", space.distill.losses, LOSSES),
    ):
        for name in given:
            if name not in known:
                raise BadInput(f"{source}:\n  space.{key}: has {name!r}; {nearest(name, known)}")


def _absolute(spec: Spec, folder: Path) -> dict[str, Any]:
    out: dict[str, Any] = {}
    place, _, name = spec.task.rpartition(":")
    if place.endswith(".py"):
        out["task"] = f"{(folder / place).resolve()}:{name}"
    if spec.target.profile is not None:
        profile = str((folder / spec.target.profile).resolve())
        out["target"] = spec.target.model_copy(update={"profile": profile})
    if spec.storage is not None and "://" not in spec.storage:
        out["storage"] = str((folder / spec.storage).resolve())
    if spec.tracking is not None:
        out["tracking"] = spec.tracking.model_copy(
            update={"uri": absolute_uri(spec.tracking.uri, folder)}
        )
    return out


def absolute_uri(uri: str, folder: Path) -> str:
    """A relative path in ``uri`` made absolute from ``folder``: a folder, with or without
    ``file:``, or a database of sqlite (three slashes and no root)."""
    match = re.fullmatch(r"(sqlite(?:\+\w+)?:///|file:|(?!databricks|uc$))([^/:][^:]*)", uri)
    return f"{match[1]}{(folder / match[2]).resolve()}" if match else uri


def _explain(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"] if part not in ("folder",))
    if error["type"] == "extra_forbidden":
        model: Any = Spec
        for part in error["loc"][:-1]:
            kind = model.model_fields[part].annotation
            options = [kind, *getattr(kind, "__args__", ())]
            model = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
        known = [name for name in model.model_fields if name != "folder"]
        return f"  {where}: unknown key; {nearest(str(error['loc'][-1]), known)}"
    got = error["input"]
    shown = "" if isinstance(got, dict) or error["type"] == "missing" else f" (got {got!r})"
    return f"  {where or 'spec'}: {_rule(error)}{shown}"


def _rule(error: Any) -> str:
    """What must hold, and what to do where that is not the same."""
    kind, known = str(error["type"]), error.get("ctx", {})
    name = next((str(part) for part in reversed(error["loc"]) if isinstance(part, str)), "spec")
    for bound, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
        if bound in known:
            return f"{name} {sign} {known[bound]:.15g} must hold"
    if kind == "missing":
        return "is missing, and has no default"
    if kind == "literal_error":
        return f"must be {known['expected']}"
    if kind == "too_short":
        return "must have at least one"
    if word := _KINDS.get(kind.partition("_")[0]):
        return f"must be {word}"
    return str(error["msg"]).removeprefix("Value error, ")
