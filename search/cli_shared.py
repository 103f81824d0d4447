"""What the commands share: the group that answers for them, arguments and options."""

from pathlib import Path
from typing import Any

import click

from ..spaces.errors import BadInput, FlyweightError


class Commands(click.Group):
    """Turns what a command raises into one clear line and the exit code that goes with it, also
    while its arguments are read and what it needs is imported, which takes seconds."""

    def invoke(self, ctx: click.Context) -> None:
        try:
            code = super().invoke(ctx) or 0
        except BadInput as error:
            click.echo(f"flyweight: {error}", err=True)
            code = 2
        except (FlyweightError, OSError) as error:
            click.echo(f"flyweight: {error}", err=True)
            code = 1
        except KeyboardInterrupt:
            more = "; a search that has begun goes on with --resume"
            searches = ctx.invoked_subcommand == "search"
            click.echo(f"interrupted{more * searches}", err=True)
            code = 130
        ctx.exit(code)


def _checked(context: click.Context, _parameter: click.Parameter, path: Path | None) -> Path | None:
    """The file of a spec. Refuses what is none before a command imports what takes seconds."""
    if path is not None and not context.resilient_parsing:
        from .spec import load_spec, spec_file

        path = spec_file(path)
        load_spec(path)
    return path


SPEC = click.argument("spec", type=click.Path(path_type=Path), callback=_checked)
SPEC_OPTION = click.option(
    "--spec", required=True, type=click.Path(path_type=Path), callback=_checked,
    help="The search.yaml, or the folder of one, or a RUN_DIR.",
)  # fmt: skip


def _found(context: click.Context, _parameter: click.Parameter, path: Path) -> Path:
    """Refuses what is no folder, in our words."""
    if context.resilient_parsing:
        return path
    if not path.is_dir():
        what = "is no folder" if path.exists() else "is not there"
        raise BadInput(
            f"RUN_DIR {path} {what}; give the folder of a search: the one named with --out, else "
            "runs/TASK-DATE where it was begun"
        )
    if path.resolve().parent.name == "artifacts" and (path / "policy.json").is_file():
        run, digest = path.resolve().parents[1], path.resolve().name[:12]
        takes = any(option.name == "digest" for option in context.command.params)
        raise BadInput(
            f"RUN_DIR {path} is one artifact of a run; name the run: "
            + (f"{run} --digest {digest}" if takes else str(run))
        )
    return path


RUN_DIR = click.argument("run_dir", type=click.Path(path_type=Path), callback=_found)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


class Duration(click.ParamType[float]):
    """ "20m" in seconds, as a spec has them."""

    name = "duration"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        from .spec import seconds

        try:
            return float(seconds(value))  # type: ignore[arg-type]  # of a string it is a number
        except ValueError:
            self.fail(f"is a duration such as 90s, 20m or 1h, but got {value!r}", param, ctx)


WAIT = click.option(
    "--wait", type=Duration(), default="0s",
    help="How long to wait for nodes that can run the trials, if a cluster has none (20m).",
)  # fmt: skip
