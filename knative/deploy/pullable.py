"""Whether a cluster can pull images, as far as their names tell."""

from collections.abc import Callable, Iterable

from knative.deploy.errors import DeployError
from knative.deploy.objects import IMAGE_VARIABLES, Object, containers

PLACEHOLDER = "registry.example.com"  # in a new project's Makefile, and in our documentation

Named = Iterable[tuple[str, str]]  # variables that choose an image, and the images


def named(objects: Iterable[Object]) -> list[tuple[str, str]]:
    """Those of our containers."""
    ours = [one for one in containers(objects) if one["name"] in IMAGE_VARIABLES]
    return list(dict.fromkeys((IMAGE_VARIABLES[one["name"]], one.get("image", "")) for one in ours))


def notes(images: Named) -> list[str]:
    """What a person should know of them, a line each."""
    images = list(images)
    found = []
    if said := _in_words(images, _is_placeholder):
        found.append(f"{said}: {PLACEHOLDER} is a placeholder, which `make deploy` and `make push` refuse")
    if said := _in_words(images, lambda image: "/" not in image):
        found.append(f"{said}: without a registry in its name an image is found only where it was loaded into the nodes")
    return found


def check(images: Named) -> None:
    """Raises DeployError for placeholders."""
    if said := _in_words(images, _is_placeholder):
        raise DeployError(
            f"{said}: {PLACEHOLDER} is a placeholder; name the image as your registry has it, at the top of the project's Makefile"
            " or after `make …`"
        )


def _is_placeholder(image: str) -> bool:
    return image.startswith(f"{PLACEHOLDER}/")


def _in_words(images: Named, chosen: Callable[[str], bool]) -> str:
    return " ".join(f"{variable}={image}" for variable, image in images if chosen(image))
