"""The commands for a search that runs as a job on a cluster."""

import json
from pathlib import Path

import click

from .cli_shared import JSON, SPEC, WAIT

ADDRESS = click.option(
    "--address",
    help="The cluster's dashboard, http://host:8265 [default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, "
    "that of the last job].",
)
JOB = click.argument("job", required=False)


@click.command()
@SPEC
@ADDRESS
@click.option("--out", help="Run directory on the cluster [default: ~/flyweight/JOB].")
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with the search in --out from its record [default: that of the last job].",
)
@WAIT
def submit(spec: Path, address: str | None, out: str | None, resume: bool, wait: float) -> None:
    """Run the search of SPEC as a job on a Ray cluster; prints the job's id.

    `status`, `logs` and `stop` without a JOB mean the job submitted last.
    """
    from .cluster import address_of
    from .cluster import submit as run

    click.echo(run(spec, address_of(address), out=out, resume=resume, wait_s=wait))


@click.command()
@JOB
@ADDRESS
@JSON
def status(job: str | None, address: str | None, as_json: bool) -> None:
    """Say how the submitted JOB stands, and the last line that it wrote: trials and best so far."""
    from .cluster import job_of, last_line
    from .cluster import status as run

    job, address = job_of(job, address)
    found = {"job": job, "status": run(job, address), "last": last_line(job, address)}
    click.echo(json.dumps(found) if as_json else f"{found['status']}\n{found['last']}".strip())


@click.command()
@JOB
@ADDRESS
def logs(job: str | None, address: str | None) -> None:
    """Follow the output of the submitted JOB."""
    from .cluster import job_of
    from .cluster import logs as run

    for line in run(*job_of(job, address)):
        click.echo(line, nl=False)


@click.command()
@JOB
@ADDRESS
def stop(job: str | None, address: str | None) -> None:
    """End the submitted JOB with the best so far."""
    from .cluster import job_of
    from .cluster import stop as run

    run(*job_of(job, address))
