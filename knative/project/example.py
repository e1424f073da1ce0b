"""The example of a project's Service, for the script that saves its weights and so knows the model."""

import json
import re
from pathlib import Path
from typing import Any

from knative.project.files import EXAMPLE_LINE, KINDS, quoted


def put_example(request: dict[str, Any], service: Path = Path("service.yaml")) -> None:
    """Into the project's service.yaml if the example there is still the one that `relight init` wrote, and say so; else print it."""
    text = service.read_text() if service.is_file() else ""
    found = re.search(EXAMPLE_LINE, text)
    new, old = quoted(json.dumps(request)), found[2] if found else ""
    if old == new:
        return
    if not found or old not in {quoted(kind.example) for kind in KINDS.values()}:
        print(f"a request for this model: {json.dumps(request)}")  # noqa: T201  of a script
        return
    service.write_text(text[: found.start(2)] + new + text[found.end(2) :])
    print(f"its example is in {service} (relight/example): {json.dumps(request)}")  # noqa: T201
