"""The commands for what a search found: register it, go back, serve it."""

import json
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import click

from .cli_shared import JSON, RUN_DIR

REGISTRY = click.option(
    "--tracking-uri",
    help="The MLflow that holds the registry [default: MLFLOW_TRACKING_URI, then where `deploy` "
    "registered a model of that name last].",
)


@click.command()
@RUN_DIR
@click.option("--digest", help="An artifact of the front (its first digits suffice).")
@click.option("--max-latency-ms", type=float, help="The most accurate within this latency.")
@click.option("--alias", default="champion", show_default=True)
@click.option("--folder", type=click.Path(path_type=Path),
              help="Also write what a device needs; without tracking only this.")  # fmt: skip
@click.option("--name", help="The registered model [default: the task's name].")
@click.option("--tracking-uri", help="Another MLflow than the search's.")
@click.option("--spec", type=click.Path(path_type=Path),
              help="The search.yaml beside its task, for a run that was fetched.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace a model that another task registered.")
@JSON
def deploy(
    run_dir: Path, digest: str | None, max_latency_ms: float | None, alias: str,
    folder: Path | None, name: str | None, tracking_uri: str | None, spec: Path | None,
    force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Verify an artifact of RUN_DIR in a clean process and register it under an alias."""
    from .deploy import deploy as run
    from .words import metric_value, milliseconds

    found = run(
        run_dir, digest=digest, max_latency_ms=max_latency_ms, alias=alias, folder=folder,
        name=name, tracking_uri=tracking_uri, force=force, spec_path=spec,
    )  # fmt: skip
    if as_json:
        click.echo(json.dumps(vars(found), indent=2, default=str))
        return
    standing = ""
    if found.version is not None:
        standing = f" version {found.version} is {found.alias}"
        if found.previous not in (None, found.version):
            standing += f", in place of version {found.previous}"
    click.echo(f"{found.name}{standing}: {found.digest[:12]}")
    here = found.verified_latency_ms
    timed = f", {milliseconds(here)} ms" if here and found.same_device else ""
    click.echo(f"Verified in a clean process: metric {metric_value(found.metric)}{timed}")
    if found.misses:
        click.echo(f"It misses limits of its search: {'; '.join(found.misses)}.")
    if found.latency_ms is None:
        click.echo(
            "Its latency was not measured: it is not on the front, or the search could not measure "
            f"(`flyweight measure {run_dir}` on the target does)."
        )
    elif not found.same_device:
        click.echo(
            "It was measured on another device: its latency here is not known until "
            f"`flyweight measure {run_dir}` times it."
        )
    if found.folder is not None:
        example = shlex.quote(str(found.folder / "example.py"))
        click.echo(f"Wrote {found.folder}: `python {example}` runs it without flyweight.")
    if found.tracking_uri is None:
        click.echo(
            "Nothing was registered: the search was not tracked; with --tracking-uri it would be."
        )
        return
    registry, hidden = _registry(found.name, found.tracking_uri), "***" in found.tracking_uri
    asks = ", with that address in full as --tracking-uri" if registry and hidden else ""
    click.echo(
        f"Registered in {found.tracking_uri} as {found.name}, version {found.version}, alias "
        f"{found.alias}. Next{asks}:"
    )
    words = ["flyweight", "serve", f"{found.name}@{found.alias}"]
    click.echo(f"  {shlex.join(words if hidden else words + registry)}")


def _registry(name: str, uri: str) -> list[str]:
    """The option that names the registry, where ``serve`` would look elsewhere."""
    from .registries import usual_uri
    from .tracking import redact

    usual = redact(usual_uri(name) or "") == uri
    return [] if usual else ["--tracking-uri", uri]


@click.command()
@click.argument("name")
@click.option("--alias", default="champion", show_default=True)
@REGISTRY
def rollback(name: str, alias: str, tracking_uri: str | None) -> None:
    """Give the alias of registered model NAME back to the version before."""
    from .registries import rollback as run

    found = run(name, alias=alias, tracking_uri=tracking_uri)
    click.echo(f"{name} version {found.version} is {alias}")


@click.command()
@click.argument("model")
@click.option("--name", help="What clients call the model [default: NAME of an alias if it "
              "begins with a letter or digit, all ASCII; else model].")  # fmt: skip
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(1, 65535))
@REGISTRY
@click.option("--batch", default=16, show_default=True, type=click.IntRange(1),
              help="Rows that run together at most; 1: never.")  # fmt: skip
@click.option("--batch-delay-ms", default=0.0, show_default=True, type=click.FloatRange(0, 1000),
              help="How long a request waits for others.")  # fmt: skip
@click.option("--max-body-mb", default=32.0, show_default=True, help="Longer requests get 413.",
              type=click.FloatRange(0, 1000, min_open=True))  # fmt: skip
@click.option("--queue", default=256, show_default=True, type=click.IntRange(1),
              help="Requests that wait at most; further ones get 503.")  # fmt: skip
@click.option("--replicas", default=1, show_default=True, type=click.IntRange(1),
              help="Processes that answer.")  # fmt: skip
@click.option("--max-replicas", default=1, type=click.IntRange(1), help="More under load, to this.")
@click.option("--poll-s", default=5.0, show_default=True, type=click.FloatRange(0.1),
              help="Seconds between looks at where the alias points.")  # fmt: skip
@click.option("--address", help="A Ray cluster (auto, on one of its nodes); local without it.")
def serve(
    model: str, name: str | None, tracking_uri: str | None, address: str | None, **options: Any
) -> None:
    """Answer HTTP requests with MODEL (Open Inference Protocol v2) on Ray Serve, until Ctrl-C.

    MODEL is an artifact's folder (RUN_DIR/artifacts/DIGEST, or of `deploy --folder`), a run
    directory (its best), an .onnx file, or an alias in the registry (NAME@champion). It is verified
    and warm before it answers. When an alias moves, the version that it names then is made ready
    beside the old one and takes over; no request fails.

    \b
    For an artifact whose input is 1 x 4:
      flyweight serve NAME@champion
      curl http://127.0.0.1:8000/v2/models/NAME            # its inputs and outputs
      curl http://127.0.0.1:8000/v2/models/NAME/infer -d \\
        '{"inputs": [{"name": "input", "shape": [1, 4], "datatype": "FP32", "data": [0, 1, 0, 1]}]}'

    It listens on this machine alone; with another --host, whoever reaches it can ask the model.
    """
    from .serve_source import NAME, alias_of, file_of

    alias = alias_of(model)
    if alias is None:
        file_of(Path(model))  # that it is there, before Ray is imported, which takes seconds
    from .serve import Options
    from .serve import serve as run

    usual = alias[0] if alias and NAME.fullmatch(alias[0]) else Options.name
    said = Options(name=name or usual, **options)
    say = partial(click.echo, err=True)
    run(model, said, tracking_uri=tracking_uri, address=address, say=say)
