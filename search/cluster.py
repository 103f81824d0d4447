"""A search as a job on a Ray cluster: checked, packed, submitted; watched; stopped."""

import asyncio
import contextlib
import logging
import os
import shlex
import uuid
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ..spaces import BadInput, FlyweightError
from .package import pack
from .remembered import recall, remember
from .run_files import RECORD
from .spec import Spec, load_spec
from .tracking import redact

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

# Beside what Ray leaves out (.git, .venv, venv, __pycache__): what earlier searches left there, and
# what is likely to be a secret.
EXCLUDES = [
    "runs/", "mlruns/", "mlartifacts/", "mlflow.db*", "*.egg-info/", ".*_cache/",
    ".env*", "*.env", "*.pem", "*.key", "auth.ini", "ray-token",
]  # fmt: skip
ENVIRONMENT = {
    # Ray blocks SIGINT in a job unless it is the signal to stop with, and kills after 3 s. A search
    # lets its running trials finish.
    "RAY_JOB_STOP_SIGNAL": "SIGINT",
    "RAY_JOB_STOP_WAIT_TIME_S": "900",
}
TIMEOUT_S = 20.0
LAST_JOB = "last job"  # by which it is remembered

_log = logging.getLogger(__name__)


def submit(
    spec_path: Path,
    address: str,
    *,
    out: str | None = None,
    resume: bool = False,
    wait_s: float = 0.0,
    entrypoint: str | None = None,
) -> str:
    """Submits the search of ``spec_path`` as a job; its id.

    The folder of the spec (also what git ignores there; .rayignore leaves things out) and this
    flyweight travel along. address: of the cluster's dashboard. out: the run directory, on the
    cluster's head; by default ~/flyweight/ID. resume: goes on with the search in it, by default
    that of the last job. wait_s: for nodes that can run the trials, where the cluster has none.
    entrypoint: a command in place of the search. The job is remembered, for who asks without its
    id.

    Raises BadInput for a spec that would not run there, an address at which no Ray cluster of this
    version answers, and a missing or wrong token; FlyweightError where the cluster refuses the job.
    """
    spec = load_spec(spec_path)
    check_travels(spec)
    job = f"flyweight-{uuid.uuid4().hex[:12]}"
    last, source = recall(LAST_JOB), str(spec_path.resolve())
    if resume and out is None:
        if last.get("spec") != source:
            raise BadInput(
                f"--resume: the last job from here was not of {spec_path}; say with --out which "
                "run goes on"
            )
        out = last["out"]
    place = out or f"~/flyweight/{job}"
    if entrypoint is None:
        # "python": the cluster's own, which is not where this one is.
        entrypoint = (
            f"python -m flyweight.search.cli search {shlex.quote(spec_path.name)} "
            f"--out {_quote(place)} --address auto --wait {wait_s:.0f}s"
            f"{' --resume' * resume}"
        )
    with TemporaryDirectory(prefix="flyweight-submit-") as folder, _connected(address) as client:
        runtime_env = {
            "working_dir": str(spec.folder),
            "excludes": [*EXCLUDES, *_runs(spec.folder)],
            "py_modules": [str(part) for part in pack(Path(folder))],
            "env_vars": ENVIRONMENT,
        }
        client.submit_job(
            entrypoint=entrypoint,
            submission_id=job,
            runtime_env=runtime_env,
            metadata={"flyweight.spec": spec_path.name, "flyweight.out": place},
        )
    remember(LAST_JOB, {"job": job, "address": address, "out": place, "spec": source})
    return job


def _runs(folder: Path) -> list[str]:
    """The run directories in ``folder``, as a .gitignore would name them."""
    places = (record.parent.relative_to(folder) for record in folder.rglob(RECORD))
    return [f"/{place.as_posix()}/" for place in places if place.parts]


def check_travels(spec: Spec) -> None:
    """Raises BadInput for what the spec names and the job would not find on the cluster."""
    place = spec.task.rpartition(":")[0]
    if place.endswith(".py"):
        file = (spec.folder / place).resolve()
        if not file.is_file():
            raise BadInput(f"task: no file {file}")
        if not file.is_relative_to(spec.folder.resolve()):
            raise BadInput(
                f"task: {file} does not lie in {spec.folder}, the folder that travels to the "
                "cluster; put it there, or the spec beside it"
            )
    if spec.tracking and spec.tracking.uri.startswith("sqlite:"):
        _log.warning(
            "tracking.uri is a database file: on the cluster it will lie in the job's folder and "
            "go with it; the record stays. Name an MLflow server to keep what it shows"
        )


def address_of(given: str | None) -> str:
    """The dashboard's address: as given, else as Ray's own tools are told, else that of the last
    job. Raises BadInput if there is none."""
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        given = given or os.environ.get(name)
    if found := given or recall(LAST_JOB).get("address"):
        return found
    raise BadInput(
        "give --address, a cluster's dashboard (http://host:8265), or set RAY_API_SERVER_ADDRESS"
    )


def job_of(job: str | None, address: str | None) -> tuple[str, str]:
    """The job that is meant and where it runs: without ``job`` the one submitted last."""
    if job is not None:
        return job, address_of(address)
    last = recall(LAST_JOB)
    if "job" not in last:
        raise BadInput(
            "no job was submitted from here: give the JOB that `flyweight submit` printed"
        )
    return last["job"], address or last.get("address") or address_of(None)


def last_line(job: str, address: str) -> str:
    """The last line that the job wrote: how far its search is, or what came of it. Raises
    BadInput."""
    with _connected(address) as client:
        _info(client, job, address)
        lines = client.get_job_logs(job).splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def status(job: str, address: str) -> str:
    """PENDING, RUNNING, SUCCEEDED, STOPPED, or FAILED with the reason. Raises BadInput."""
    with _connected(address) as client:
        info = _info(client, job, address)
    word = str(info.status.value)
    return f"{word}: {info.message}" if word == "FAILED" and info.message else word


def logs(job: str, address: str) -> Iterator[str]:
    """What the job wrote, in pieces as they come, until it ends. Raises BadInput."""
    with _connected(address) as client:
        _info(client, job, address)
        pieces = client.tail_job_logs(job)
        with asyncio.Runner() as runner, contextlib.suppress(StopAsyncIteration):
            while True:
                yield runner.run(anext(pieces))  # type: ignore[arg-type]


def stop(job: str, address: str) -> bool:
    """Asks the job to end with the best so far; False if it had ended. Raises BadInput."""
    with _connected(address) as client:
        _info(client, job, address)
        return client.stop_job(job)


def token() -> str | None:
    """The cluster's token, from where Ray reads it."""
    if value := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return value
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return path.read_text().strip() or None
    except OSError:
        return None


def check(address: str, headers: dict[str, str]) -> None:
    """Raises BadInput unless a Ray cluster of this version answers at ``address``."""
    import ray
    import requests

    shown = redact(address)
    if not address.startswith(("http://", "https://")):
        raise BadInput(f"--address is a cluster's dashboard, http://host:8265, but got {shown!r}")
    try:
        # A redirect could carry the token elsewhere.
        answer = requests.get(
            f"{address.rstrip('/')}/api/version",
            headers=headers,
            timeout=TIMEOUT_S,
            allow_redirects=False,
        )
    except (requests.RequestException, ValueError) as error:
        raise BadInput(f"nothing answers at {shown}: {type(error).__name__}") from None
    if answer.status_code in (401, 403):
        what = "the token is not this cluster's" if headers else "the cluster asks for a token"
        raise BadInput(
            f"{shown} refused (HTTP {answer.status_code}): {what}, so that nobody else can run "
            "code on it; set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file that holds it"
        )
    try:
        found = str(answer.json()["ray_version"])
    except (ValueError, KeyError, TypeError):
        raise BadInput(
            f"{shown} answers (HTTP {answer.status_code}), but not as a Ray cluster does"
        ) from None
    if found != ray.__version__:
        raise BadInput(
            f"{shown} runs Ray {found}, this is Ray {ray.__version__}; flyweight needs the same on "
            "both, the cluster's comes from constraints.txt"
        )
    if not headers:
        _log.warning("%s takes jobs without a token: whoever reaches it can run code there", shown)


@contextlib.contextmanager
def _connected(address: str) -> "Iterator[JobSubmissionClient]":
    """A client of the cluster at ``address``, and of no other; Ray's errors become flyweight's."""
    secret = token()
    headers = {"Authorization": f"Bearer {secret}"} if secret else {}
    check(address, headers)
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard_sdk", "job.sdk"):  # they narrate, at a level of their own
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)

    # The first two would win over the address given. Ray leaves out what git ignores: weights and
    # data, which the task needs.
    changes = {
        "RAY_ADDRESS": None, "RAY_API_SERVER_ADDRESS": None, "RAY_RUNTIME_ENV_IGNORE_GITIGNORE": "1"
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in changes}
    _set(changes)
    try:
        yield JobSubmissionClient(address, headers=dict(headers))
    except (RayError, OSError, RuntimeError, ValueError) as error:
        reason = redact(str(error), address)
        raise FlyweightError(f"the cluster at {redact(address)} refused: {reason}") from error
    finally:
        _set(before)


def _set(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _info(client: "JobSubmissionClient", job: str, address: str) -> Any:
    try:
        return client.get_job_info(job)
    except RuntimeError as error:
        if "status code 404" not in str(error):
            raise
        raise BadInput(f"no job {job!r} at {redact(address)}") from None


def _quote(place: str) -> str:
    """``place`` for a shell, which is to fill in a leading ~."""
    return f"~/{shlex.quote(place[2:])}" if place.startswith("~/") else shlex.quote(place)
