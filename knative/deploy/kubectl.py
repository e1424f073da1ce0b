"""kubectl as a subprocess, and what its complaints mean."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from knative.deploy.errors import KubectlError

# Reasons of a KubectlError. Patterns are of kubectl 1.30 to 1.37.
UNREACHABLE = "unreachable"
REFUSED = "refused"
NOT_FOUND = "not found"
NO_KIND = "no kind"

_REASONS = (
    (
        UNREACHABLE,
        r"was refused|no such host|Unable to connect|i/o timeout|deadline exceeded|no configuration has been provided"
        r"|current-context|context .* does not exist|connect: |connection reset|EOF$|certificate|invalid configuration",
    ),
    (REFUSED, r"Unauthorized|must be logged in|Forbidden|forbidden"),
    (NO_KIND, r"no matches for kind|doesn't have a resource type|could not find the requested resource"),
    (NOT_FOUND, r"not found|NotFound"),
)


class Kubectl:
    """Runs kubectl; each call has a time limit, so that nothing hangs in silence."""

    def __init__(self, executable: Path | None = None, timeout_s: float = 60.0) -> None:
        """executable: by default the one of this virtual environment, else that on PATH. Raises KubectlError if there is none."""
        self._timeout_s = timeout_s
        beside = Path(sys.executable).with_name("kubectl")
        found = str(executable) if executable else str(beside) if beside.exists() else "kubectl"
        path = shutil.which(found)
        if not path:
            raise KubectlError(f"{found} is not there: install kubectl (`make setup` brings it), or name it with KUBECTL=")
        self.path = path

    def run(self, *arguments: str, text: str | None = None) -> str:
        """What it prints. Raises KubectlError with what it says of a failure."""
        request = () if arguments[0] in ("kustomize", "logs") else (f"--request-timeout={self._timeout_s:.0f}s",)
        try:
            done = subprocess.run(
                [self.path, *arguments, *request],
                input=text,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self._timeout_s + 30,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise KubectlError(f"kubectl {arguments[0]} did not end within {error.timeout:.0f} s", UNREACHABLE) from None
        except OSError as error:
            raise KubectlError(f"{self.path} cannot be run: {error.strerror or error}") from error
        if done.returncode:
            said = "\n".join(line for line in done.stderr.splitlines() if not re.match(r"[EWI]\d{4} ", line)).strip() or done.stderr.strip()
            reason = next((name for name, pattern in _REASONS if re.search(pattern, said, re.MULTILINE)), "")
            raise KubectlError(said or f"kubectl {arguments[0]} ended with status {done.returncode}", reason)
        return done.stdout

    def get(self, *arguments: str) -> Any:
        """The document of `kubectl get … -o json`."""
        return json.loads(self.run("get", *arguments, "-o", "json"))

    def items(self, *arguments: str) -> list[dict[str, Any]]:
        """The objects of a list; none if it is empty."""
        found: list[dict[str, Any]] = self.get(*arguments)["items"]
        return found
