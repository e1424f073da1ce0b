"""A new project's folder."""

from pathlib import Path

from knative.deploy.variables import service_name
from knative.project.errors import ProjectError
from knative.project.files import KINDS, files


def make_project(folder: Path, kind: str) -> None:
    """Write a project of that kind into a folder that is new or empty; its name is the function's. Nothing is overwritten.

    What begins with a dot may be there already (.git, .venv), unless it is one of the project's files. Raises ProjectError, and
    VariableError for a name that no Service can have.
    """
    service_name("NAME", folder.name)
    made = files(folder.name, KINDS[kind])
    ours = {Path(path).parts[0] for path in made}
    try:
        folder.mkdir(exist_ok=True)
        there = sorted(path.name for path in folder.iterdir() if not path.name.startswith(".") or path.name in ours)
        if there:
            named = ", ".join(there[:3]) + (", …" if len(there) > 3 else "")
            raise ProjectError(f"{folder} is not empty ({named}): nothing was written; choose another name, or make the folder empty")
        for path, text in made.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            with (folder / path).open("x") as file:
                file.write(text)
    except OSError as error:
        raise ProjectError(f"{error.filename}: {error.strerror}") from error
