"""`relight cluster`: what `make render|deploy|undeploy|status|logs|invoke|build|push` do."""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

import click

from knative.deploy import agent, images, rollout
from knative.deploy.agent import EXAMPLE
from knative.deploy.errors import DeployError
from knative.deploy.kubectl import Kubectl
from knative.deploy.render import deadline_s, dump, render, render_cluster
from knative.deploy.variables import Variables
from knative.local import plain, sent_headers
from weights_cache.environment import masked

INVOKE_S = 600.0  # a cold start is waited for; Knative itself gives up sooner


class _Command(click.Command):
    """Our errors are for people: one message and exit status 1, no traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DeployError as error:
            raise click.ClickException(_shown(str(error))) from error


class _Group(click.Group):
    command_class = _Command


def _shown(text: str) -> str:
    """What a cluster, a pod or a function has said, for a terminal: it moves no cursor, and passwords in URLs are masked."""
    return plain.body(masked(text))


def _say(text: str) -> None:
    click.echo(_shown(text))


@click.group(cls=_Group)
def cluster() -> None:
    """Bring an overlay to a cluster. Variables are given as NAME=value; docs/deploy.md lists them."""


def _variables(command: Callable[[Variables], None]) -> Callable[..., None]:
    def call(words: tuple[str, ...], from_make: str) -> None:
        command(Variables.parse([*words, *(f"{name}={os.environ.get(name, '')}" for name in from_make.split())]))

    call.__name__, call.__doc__ = command.__name__, command.__doc__
    call = click.option("--from-make", default="", hidden=True, help="Names of variables whose values are in the environment.")(call)
    return click.argument("words", nargs=-1, metavar="[NAME=value]...")(call)


@cluster.command(name="render")
@_variables
def render_(variables: Variables) -> None:
    """Print the manifests of an overlay (ENV=)."""
    objects = render(variables, Kubectl(variables.kubectl))
    for note in agent.check(variables, objects):
        click.echo(f"note: {note}", err=True)
    click.echo(dump(objects), nl=False)


@cluster.command()
@_variables
def config(variables: Variables) -> None:
    """Print what an administrator applies once for an overlay: flags, priorities."""
    click.echo(dump(render_cluster(variables, Kubectl(variables.kubectl))), nl=False)


@cluster.command()
@_variables
def deploy(variables: Variables) -> None:
    """Apply an overlay, and wait until it is ready."""
    kubectl = Kubectl(variables.kubectl)
    service = rollout.deploy(variables, kubectl, _say)
    annotations = service["spec"]["template"].get("metadata", {}).get("annotations", {})
    if annotations.get("autoscaling.knative.dev/initial-scale") == "0":
        # Ready without a pod: only a call shows that it starts. It also brings the new revision onto the GPU that the old one leaves.
        click.echo("starting it with a first call")
        try:
            code, answer = _ask(variables, service, "/v1/models", None, deadline_s(service))
        except _NotReached as error:
            _say(f"note: {error}; the first caller will start it")
        else:
            if code >= 500:
                raise DeployError(f"the first call was answered {code}: {_message(answer)}\n{rollout.standing(kubectl, service)}")


@cluster.command()
@_variables
def undeploy(variables: Variables) -> None:
    """Delete what `deploy` made."""
    rollout.undeploy(variables, Kubectl(variables.kubectl), _say)


@cluster.command()
@_variables
def status(variables: Variables) -> None:
    """Show the Service, its revisions and pods; the exit status is 1 if it is not ready."""
    kubectl = Kubectl(variables.kubectl)
    service = rollout.find(variables, kubectl)
    lines = rollout.status_in_words(kubectl, service)
    _say("\n".join(lines))
    raise SystemExit(0 if ": ready, " in lines[0] else 1)


@cluster.command()
@_variables
def logs(variables: Variables) -> None:
    """Print the log of the Service's pods (CONTAINER=, FOLLOW=true)."""
    kubectl = Kubectl(variables.kubectl)
    service = rollout.find(variables, kubectl)
    name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
    arguments = ["logs", "-n", namespace, "-l", f"serving.knative.dev/service={name}", "-c", variables.container, "--tail=200", "--prefix"]
    if variables.follow:
        os.execv(kubectl.path, [kubectl.path, *arguments, "--follow"])  # noqa: S606  Ctrl-C is kubectl's own
    log = kubectl.run(*arguments) or f"{name} has no pods, and so no log: at zero\n"
    click.echo("\n".join(map(plain.log_line, log.split("\n"))), nl=False)


@cluster.command()
@_variables
def invoke(variables: Variables) -> None:
    """Send a request (DATA=, ROUTE=, HEADER=; by default the Service's example) and print the answer; an error ends with status 1."""
    service = rollout.find(variables, Kubectl(variables.kubectl))
    body = variables.data
    if body is None and variables.route == "/":
        body = service["metadata"].get("annotations", {}).get(EXAMPLE)
        if body is None:
            raise DeployError(f"{service['metadata']['name']} has no example (EXAMPLE= of `make deploy`): say what to send, DATA='{{…}}'")
    try:
        code, answer = _ask(variables, service, variables.route, body, INVOKE_S)
    except _NotReached as error:
        raise DeployError(str(error)) from error
    click.echo(plain.body(answer))
    raise SystemExit(1 if code >= 400 else 0)


@cluster.command()
@_variables
def build(variables: Variables) -> None:
    """Build the images (IMAGE=, WEIGHTS_IMAGE=, QUEUE_IMAGE=, VARIANT=cpu|cuda, SBOM=folder, OPTIONS=).

    With AGENT_DIR=folder: the image of the agent in that folder, as IMAGE=, on top of the function's (BASE_IMAGE=).
    """
    images.build(variables, click.echo)


@cluster.command()
@_variables
def push(variables: Variables) -> None:
    """Push the images to their registries."""
    images.push(variables, click.echo)


class _NotReached(Exception):
    pass


def _message(answer: str) -> str:
    """What an answer that is an error says, in one line."""
    try:
        found = json.loads(answer)["error"]
        answer = found["message"] if isinstance(found, dict) else str(found)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass  # the activator's own, or a proxy's
    return plain.line(answer.strip() or "nothing", 500)


def _ask(variables: Variables, service: dict[str, Any], route: str, body: str | None, timeout_s: float) -> tuple[int, str]:
    url = service.get("status", {}).get("url")
    if not url:
        raise DeployError(f"{service['metadata']['name']} has no URL yet: `make status` tells why")
    headers = {"Content-Type": "application/json"} if body is not None else {}
    headers |= dict(sent_headers.parse([variables.header] if variables.header else []))
    if variables.address:  # the gateway chooses by the host
        headers["Host"], url = urlsplit(url).netloc, variables.address
    request = urllib.request.Request(url.rstrip("/") + route, body.encode() if body is not None else None, headers)  # noqa: S310  http or https
    try:
        with _opener(url).open(request, timeout=timeout_s) as reply:
            return reply.status, reply.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")
    except (OSError, ValueError, HTTPException) as error:
        raise _NotReached(
            f"{url} cannot be reached from here ({getattr(error, 'reason', error)}); forward the gateway's port"
            " (kubectl port-forward -n kourier-system service/kourier 8080:80) and name it with ADDRESS=http://127.0.0.1:8080"
        ) from error


def _opener(url: str) -> urllib.request.OpenerDirector:
    """What is on this machine, as a forwarded port is, is asked for without the proxy of the environment."""
    is_here = urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
    return urllib.request.build_opener(urllib.request.ProxyHandler({} if is_here else None))
