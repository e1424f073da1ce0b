"""`relight init`."""

from pathlib import Path

import click

from knative.deploy.errors import VariableError
from knative.project.errors import ProjectError
from knative.project.files import KINDS
from knative.project.init import make_project


@click.command()
@click.argument("name", required=False)
@click.option(
    "--from",
    "kind",
    type=click.Choice(list(KINDS)),
    default="torch",
    show_default=True,
    help="What the model is: a torch module; of transformers one for a task, for chat, for embeddings; an ONNX file.",
)
def init(name: str | None, kind: str) -> None:
    """Make a project of your own: an agent, a script that saves its weights, tests, an image, and all that a cluster needs.

    It goes into a new folder NAME; without NAME into this one, which must be empty. The folder's name is the function's.
    """
    if name and Path(name).name != name:
        raise click.ClickException(f"{name}: name the function alone; its folder is made here")
    folder = Path.cwd() / (name or "")
    try:
        make_project(folder, kind)
    except (ProjectError, VariableError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(_next(folder.name, kind, is_new=name is not None))


def _next(name: str, kind: str, *, is_new: bool) -> str:
    """The commands to an answer."""
    lines = [
        (f"python save_weights.py {KINDS[kind].source}".rstrip(), "writes weights/"),
        ("relight run", "serves it at http://127.0.0.1:8080/, and goes to zero when nobody calls"),
        (f"relight invoke {name}", "in another terminal: the first answer"),
    ]
    width = max(len(command) for command, _ in lines)
    said = [f"  {command:{width}}   # {what}" for command, what in lines]
    if is_new:
        said.insert(0, f"  cd {name}")
    return "\n".join([f"{name}: {KINDS[kind].about}", *said, "README.md there has the way to a cluster."])
