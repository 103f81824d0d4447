"""The command line. Exit codes: 0 done, 1 failure, 2 bad input, 130 interrupted."""

import contextlib
import json
import logging
import random
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import click

from ..spaces.errors import BadInput
from .cli_cluster import logs, status, stop, submit
from .cli_models import deploy, rollback, serve
from .cli_shared import JSON, RUN_DIR, SPEC, SPEC_OPTION, WAIT, Commands


def _quiet() -> None:
    """What libraries narrate does not help a user; errors arrive as exceptions."""
    warnings.filterwarnings("ignore")
    for name in ("ray", "torch.onnx", "alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.ERROR)


@click.group(
    cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(version("flyweight"), prog_name="flyweight")
def main() -> None:
    """Make a trained PyTorch model fast enough for the device where it will run.

    flyweight searches over combined pruning, distillation and quantization policies, measures
    every finalist on the target's runtime, and records all trials in MLflow.

    \b
    A first search:
      flyweight init my-search          writes a starter task.py and search.yaml
      flyweight plan my-search/search.yaml
      flyweight search my-search/search.yaml --out my-search/run
      flyweight report my-search/run
      flyweight deploy my-search/run
      flyweight serve my-search/run     answers HTTP

    Exit codes: 0 done, 1 failure, 2 bad input (before any trial), 130 interrupted.
    """
    _quiet()


@main.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
def init(folder: Path) -> None:
    """Write a starter task.py and search.yaml into DIR; they run as they are."""
    templates = Path(__file__).parent / "templates"
    names = ("task.py", "search.yaml")
    for name in names:
        if (folder / name).exists():
            raise BadInput(f"{folder / name} exists; choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{folder} cannot be a folder: {error}; choose another") from error
    for name in names:
        (folder / name).write_text((templates / f"{name}.txt").read_text())
    click.echo(f"Wrote {folder / 'task.py'} and {folder / 'search.yaml'}. Next:")
    click.echo(f"  flyweight plan {folder / 'search.yaml'}")


@main.command()
@SPEC
@JSON
def plan(spec: Path, as_json: bool) -> int:
    """Check SPEC and its task; show the space, the teacher, the reachable speed and the cost.

    Trains nothing. Exit code 1 if a limit is out of reach.
    """
    from rich.console import Console

    from .plan import make_plan, print_plan

    found = make_plan(spec, Console(stderr=True, emoji=False))
    click.echo(json.dumps(found, indent=2)) if as_json else print_plan(found)
    return 0 if found["reachable"] else 1


@main.command()
@SPEC
@click.option("--out", type=click.Path(path_type=Path), help="Run directory [default: runs/...].")
@click.option("--resume", is_flag=True, help="Go on with the search in --out from its record.")
@click.option(
    "--address",
    help="A Ray cluster that this machine is a node of (auto, host:6379); a local Ray without it.",
)
@WAIT
@JSON
def search(
    spec: Path, out: Path | None, resume: bool, address: str | None, wait: float, as_json: bool
) -> int:
    """Run the search that SPEC describes; Ctrl-C ends it with the best so far.

    If nothing keeps to the limits, the last line says what the nearest miss lacks (result.json:
    "best" is null); `deploy --digest` takes it nevertheless.
    """
    from rich.console import Console

    from .driver import search as run
    from .progress import closing_sentence, closing_table
    from .spec import load_spec

    console = Console(stderr=as_json, emoji=False)
    # Ray prints by itself that a worker died.
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        outcome = run(
            load_spec(spec), out, resume=resume, address=address, wait_s=wait, console=console
        )
    for note in outcome.notes:
        console.print(f"Note: {note}", markup=False)
    if as_json:
        click.echo(json.dumps(outcome.result, indent=2))
    else:
        console.print(closing_table(outcome.result))
    console.print(f"Report: {outcome.run_dir / 'report.html'}", markup=False, soft_wrap=True)
    said = closing_sentence(outcome.result)  # last: it is what one came for
    console.print(said, markup=False, highlight=False, soft_wrap=True)
    if outcome.interrupted:
        goes_on = (
            f"Interrupted: `flyweight search {spec} --out {outcome.run_dir} --resume` goes on."
        )
        console.print(goes_on, markup=False, highlight=False, soft_wrap=True)
        return 130
    return 1 if outcome.failed else 0


@main.command()
@SPEC_OPTION
@click.option("--runtime", help="Instead of the spec's target.runtime.")
@click.option("--threads", type=click.IntRange(1), help="Instead of the spec's target.threads.")
@click.option(
    "-o", "out", type=click.Path(path_type=Path), default=Path("profile.jsonl"), show_default=True
)
@click.option(
    "--like",
    type=click.Path(path_type=Path),
    help="The profile of another device for the same SPEC, to need few networks of this one.",
)
@click.option(
    "--networks",
    type=click.IntRange(1),
    help="Networks to time at most [default: 960, with --like 24].",
)
@click.option(
    "--minutes",
    default=15.0,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="Time to spend at most.",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of policies.")
def profile(
    spec: Path, runtime: str | None, threads: int | None, out: Path, like: Path | None,
    networks: int | None, minutes: float, seed: int,
) -> None:  # fmt: skip
    """Time networks of SPEC's space on this device, so that latencies can be predicted.

    Ends when predictions are good to a few per cent, or at a limit. Begun again, it goes on with
    the file. Let nothing else run on the device meanwhile. Name the file in the spec's
    target.profile and a search will predict instead of timing each policy.

    \b
    A second device (another machine, number of threads, or version of the runtime):
      flyweight profile --spec SPEC --like first.jsonl -o second.jsonl
    times a few networks there and learns how it differs from the first. second.jsonl holds what it
    needs of first.jsonl.
    """
    from rich.console import Console

    from ..kernels.predictor import enough
    from .predict import profile as run

    made = run(
        spec, out, like=like, runtime=runtime, threads=threads, networks=networks, minutes=minutes,
        seed=seed, console=Console(stderr=True, emoji=False),
    )  # fmt: skip
    click.echo(f"Wrote {out}: {len(made.timed)} networks on device {made.fingerprint}")
    try:
        enough(made)
    except BadInput as error:
        click.echo(
            f"No search takes it: {error}. Where the space has no more, name no target.profile: a "
            "search then times its policies by itself"
        )
    else:
        click.echo(f"For searches:\n  target: {{profile: {out.resolve()}}}")


@main.command()
@click.argument("policies", metavar="POLICY...", nargs=-1, required=True,
                type=click.Path(path_type=Path))  # fmt: skip
@click.option("--profile", "profile_path", type=click.Path(path_type=Path),
              help="A device profile [default: the spec's target.profile; a run's names the one "
              "that it made].")  # fmt: skip
@SPEC_OPTION
@click.option("--allow-foreign", is_flag=True, help="Use a profile of another device.")
@JSON
def predict(
    policies: tuple[Path, ...],
    profile_path: Path | None,
    spec: Path,
    allow_foreign: bool,
    as_json: bool,
) -> None:
    """Predict the latency of each POLICY with its 90% interval; builds nothing.

    A POLICY is a JSON file, the folder of an artifact, or with a run as --spec the beginning of the
    digest of one of its artifacts.

    --json: a list in the order of the policies, predicted_latency_ms being lower end, middle and
    upper end, or null for a policy with work that the runtime died of.

    The teacher is timed first, since a device is not always as fast as it was when it was profiled.
    """
    from .predict import predict as run
    from .store import policy_file
    from .words import milliseconds

    files = [policy_file(policy, spec.parent) for policy in policies]
    found = run(files, spec, profile_path, allow_foreign=allow_foreign)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for path, case in zip(policies, found, strict=True):
        if case["predicted_latency_ms"] is None:
            click.echo(f"{path}: the runtime died of networks with work that this policy has")
            continue
        low, middle, high = case["predicted_latency_ms"]
        ends = f"{milliseconds(low)} to {milliseconds(high)}"
        click.echo(f"{path}: {milliseconds(middle)} ms ({ends})")


@main.command()
@click.argument("policy", type=click.Path(path_type=Path))
@SPEC_OPTION
@click.option("--profile", "profile_path", type=click.Path(path_type=Path),
              help="A device profile [default: the spec's target.profile].")  # fmt: skip
@click.option("--allow-foreign", is_flag=True, help="Use a profile of another device.")
@JSON
def explain(
    policy: Path, spec: Path, profile_path: Path | None, allow_foreign: bool, as_json: bool
) -> None:
    """Say where the time of POLICY goes, and what other choices would change.

    POLICY is a JSON file, the folder of an artifact, or with a run as --spec the beginning of the
    digest of one of its artifacts.

    For each kernel its width, precision and time, beside the teacher's; for each group of channels
    what the next legal width down and up would change; and at which widths a layer is slower in
    int8 than in fp32, the rest of the policy being as it is; for a policy in the artifacts of a run
    also what its choices harm, from the run's sensitivity table. It needs a device profile, as
    `flyweight profile` makes it: no kernel can be timed alone where it stands in a network, so what
    each takes is learned from whole networks, and said with how sure that is.

    In a run directory, `--json > explain.json` puts it into the report.
    """
    from .explain import explain as run
    from .explained import print_explanation
    from .fragile import print_fragile
    from .store import policy_file

    policy = policy_file(policy, spec.parent)
    found = run(policy, spec, profile_path, allow_foreign=allow_foreign)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        print_explanation(found)
        print_fragile(policy)


@main.command()
@SPEC_OPTION
@click.option("-n", "count", required=True, type=click.IntRange(1), help="How many policies.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("-o", "out", type=click.Path(path_type=Path), help="Folder for one file each.")
def sample(spec: Path, count: int, seed: int, out: Path | None) -> None:
    """Write N random legal policies, one JSON file each (without -o: one a line)."""
    from .plan import space_of
    from .store import write_json

    space, rng = space_of(spec), random.Random(seed)
    for number in range(count):
        policy = space.sample(rng)
        if out is None:
            click.echo(policy.canonical())
        else:
            write_json(out / f"policy-{number:0{len(str(count - 1))}d}.json", policy.to_dict())
    if out is not None:
        click.echo(f"Wrote {count} policies to {out}", err=True)


@main.command()
@click.argument("policy", type=click.Path(path_type=Path))
@SPEC_OPTION
@click.option(
    "--rung", default="full", show_default=True,
    type=click.Choice(["recalibrate", "short", "full"]),
)  # fmt: skip
@click.option(
    "-o", "out", type=click.Path(path_type=Path), default=Path("replay"), show_default=True
)
@JSON
def replay(policy: Path, spec: Path, rung: str, out: Path, as_json: bool) -> None:
    """Rebuild one artifact from its POLICY: a JSON file, the folder of an artifact, or with a run
    as --spec the beginning of the digest of one of its artifacts."""
    from .plan import replay as run
    from .store import policy_file
    from .words import metric_value

    found = run(policy_file(policy, spec.parent), spec, rung, out)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        click.echo(
            f"{found['artifact']}: metric {metric_value(found['metric'])}, "
            f"{found['size_bytes']} bytes"
        )


@main.command()
@RUN_DIR
@click.option(
    "--beside", multiple=True, type=click.Path(path_type=Path), metavar="OTHER_RUN",
    help="A run of the same task and target to compare with; up to four times.",
)  # fmt: skip
def report(run_dir: Path, beside: tuple[Path, ...]) -> None:
    """Write the report of RUN_DIR anew, also while its search still runs.

    RUN_DIR/report.html is the page; front.csv, trials.csv and front.png lie beside it.
    """
    from .reading import read_run
    from .report import write_report_of

    run = read_run(run_dir)
    click.echo(write_report_of(run, beside))
    if lacking := run.lacking:
        click.echo(f"{lacking}: the report has no front", err=True)


@main.command()
@RUN_DIR
@click.option(
    "--tracking-uri",
    envvar="MLFLOW_TRACKING_URI",
    help="Another MLflow than the search's, or its address with the password.",
)
def deliver(run_dir: Path, tracking_uri: str | None) -> None:
    """Tell MLflow what it lacks of the search in RUN_DIR: for when it was away at the end.

    May be repeated; nothing is there twice.
    """
    from .deliver import deliver as run

    click.echo(f"MLflow has all of it, as run {run(run_dir, tracking_uri)}")


@main.command()
@RUN_DIR
@JSON
def measure(run_dir: Path, as_json: bool) -> None:
    """Time the finalists of RUN_DIR on this device; make its front, best and report anew.

    For a run whose search could not measure (a cluster without a node like the target), or that
    was fetched to another device. It needs RUN_DIR and nothing else, and changes nothing until all
    is measured. Let nothing else run on the device meanwhile.
    """
    from rich.console import Console

    from .measure import measure as run
    from .progress import closing_sentence, closing_table

    console = Console(stderr=as_json, emoji=False)
    found = run(run_dir, console.print)
    for note in found.notes:
        console.print(f"Note: {note}", markup=False)
    if as_json:
        click.echo(json.dumps(found.result, indent=2))
    else:
        console.print(closing_table(found.result))
    said = closing_sentence(found.result)
    console.print(said, markup=False, highlight=False, soft_wrap=True)


for command in (submit, status, logs, stop, deploy, rollback, serve):
    main.add_command(command)


if __name__ == "__main__":
    main()
