"""From a Service's template to the processes of one pod: commands, environments, directories, ports, probes. Starts nothing."""

import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from knative.local.errors import ManifestError
from knative.local.manifest import Manifests, Service
from knative.local.schema import Container, ProbeSpec

# A process inherits our environment, but not what configures somebody else: a container has just what its manifest says.
_NOT_INHERITED = re.compile(r"^(FUNCTION_|WEIGHTS_|QUEUE_SOURCE_|AWS_|K_|MAKE|PORT$|MFLAGS$)")

# Two pods share this machine's ports, which in a cluster they would not.
_PORT_SETTINGS = {"WEIGHTS_PORT", "FUNCTION_METRICS_PORT"}


@dataclass(frozen=True)
class Probe:
    """A probe of a process; `port` is the local one."""

    port: int
    path: str | None  # None: a TCP connect is enough
    headers: Mapping[str, str]
    period_s: float
    timeout_s: float
    failures: int  # in a row until it counts as failed
    delay_s: float


@dataclass(frozen=True)
class Process:
    """One container as a process to start. `directories` are its volumes, to be made first."""

    container: str
    is_main: bool  # the one that is called
    argv: tuple[str, ...]
    env: Mapping[str, str]
    cwd: Path | None
    directories: tuple[Path, ...]
    log: Path
    readiness: Probe | None
    liveness: Probe | None


@dataclass(frozen=True)
class PodPlan:
    """What one pod is made of. `port`: where its user container listens."""

    port: int
    processes: tuple[Process, ...]


@dataclass(frozen=True)
class Places:
    """Where things lie on this machine."""

    state_dir: Path

    def pod(self, name: str) -> Path:
        """What lives as long as the pod."""
        return self.state_dir / "pods" / name

    def log(self, service: Service, pod: str, container: str) -> Path:
        """A container's output; kept when the pod is gone."""
        return self.state_dir / "logs" / service.namespace / pod / f"{container}.log"

    def volume(self, service: Service, pod: str, name: str) -> Path:
        """A volume's directory: the pod's own for emptyDir; for the other kinds one that all pods share and that is kept."""
        source = next(volume for volume in service.spec.volumes if volume.name == name)
        if source.persistent_volume_claim:
            return self.state_dir / "volumes" / service.namespace / source.persistent_volume_claim.claim_name
        if source.host_path:
            return self.state_dir / "host" / source.host_path.path.lstrip("/")
        return self.pod(pod) / "volumes" / name


def check_references(manifests: Manifests) -> None:
    """Raises ManifestError for a reference to a ConfigMap or Secret that is not there."""
    for service in manifests.services:
        for container in service.spec.containers:
            _declared_env(service, container, manifests)


def plan_pod(
    service: Service,
    *,
    revision: str,
    pod: str,
    places: Places,
    manifests: Manifests,
    free_port: Callable[[], int],
    addresses: Mapping[str, str],
) -> PodPlan:
    """The processes of one new pod.

    free_port: called for each port of the pod. addresses: what a manifest calls an embedded server, and where that is on this machine.
    Raises ManifestError for a reference to a ConfigMap or Secret that is not there.
    """
    main = service.user_container
    declared = main.ports[0].container_port if main.ports else 8080
    ports = {declared: free_port()}
    for container in service.spec.containers:
        for port in _own_ports(container):
            ports.setdefault(port, free_port())
    processes = []
    for container in service.spec.containers:
        mounts = {
            mount.mount_path.rstrip("/"): places.volume(service, pod, mount.name) / mount.sub_path for mount in container.volume_mounts
        }
        env = _declared_env(service, container, manifests)
        env = {
            name: str(ports.get(int(value), value)) if name.endswith("_PORT") and value.isdigit() else value for name, value in env.items()
        }
        if container is main:
            env["PORT"] = str(ports[declared])
        env |= {"K_SERVICE": service.name, "K_CONFIGURATION": service.name, "K_REVISION": revision}
        here = _rewriter(mounts, addresses)
        env = {name: here(value) for name, value in env.items()}
        argv = tuple(_expand(here(word), env) for word in (*container.command, *container.args))
        processes.append(
            Process(
                container=container.name,
                is_main=container is main,
                argv=argv,
                env=inherited() | env,
                cwd=Path(here(container.working_dir)) if container.working_dir else None,
                directories=tuple(mounts.values()),
                log=places.log(service, pod, container.name),
                readiness=_readiness(container, is_main=container is main, declared=declared, ports=ports),
                liveness=_probe(container.liveness_probe, declared, ports, every_s=10) if container.liveness_probe else None,
            )
        )
    return PodPlan(ports[declared], tuple(processes))


def _own_ports(container: Container) -> set[int]:
    """Ports that a variable tells the container to open: those that its probes ask, and those of our own programs.

    A port that is probed and named by no variable is fixed in the program, and cannot be moved.
    """
    probes = (container.liveness_probe, container.readiness_probe, container.startup_probe)
    targets = [probe.http_get or probe.tcp_socket for probe in probes if probe]
    asked = {target.port for target in targets if target}
    told = [
        (variable.name, int(variable.value)) for variable in container.env if variable.name.endswith("_PORT") and variable.value.isdigit()
    ]
    return {port for name, port in told if name in _PORT_SETTINGS or port in asked}


def _declared_env(service: Service, container: Container, manifests: Manifests) -> dict[str, str]:
    env: dict[str, str] = {}
    for source in container.env_from:
        for kind, objects, ref in (
            ("ConfigMap", manifests.config_maps, source.config_map_ref),
            ("Secret", manifests.secrets, source.secret_ref),
        ):
            if ref:
                data = objects.get((service.namespace, ref.name))
                if data is None and not ref.optional:
                    raise _missing(service, container, f"{kind} {ref.name}")
                env |= {source.prefix + key: value for key, value in (data or {}).items()}
    for variable in container.env:
        value: str | None = variable.value
        if variable.value_from:
            for kind, objects, key in (
                ("ConfigMap", manifests.config_maps, variable.value_from.config_map_key_ref),
                ("Secret", manifests.secrets, variable.value_from.secret_key_ref),
            ):
                if key:
                    value = objects.get((service.namespace, key.name), {}).get(key.key)
                    if value is None and not key.optional:
                        raise _missing(service, container, f"key {key.key} of {kind} {key.name}")
        if value is not None:
            env[variable.name] = _expand(value, env)
    return env


def _missing(service: Service, container: Container, what: str) -> ManifestError:
    return ManifestError(
        service.file, f"Service {service.name}: container {container.name}", f"refers to {what}, which is in no manifest here"
    )


def _expand(text: str, env: Mapping[str, str]) -> str:
    """Kubernetes' `$(NAME)`; a name that is not set stays as it is, and `$$` is one `$`, also before a bracket."""
    return re.sub(r"\$\$|\$\(([^)]*)\)", lambda match: "$" if match[0] == "$$" else env.get(match[1], match[0]), text)


def _rewriter(mounts: Mapping[str, Path], addresses: Mapping[str, str]) -> Callable[[str], str]:
    """Turns what is true inside a container into what is true on this machine."""
    deepest_first = sorted(mounts.items(), key=lambda mount: -len(mount[0]))

    def rewrite(text: str) -> str:
        for address, here in addresses.items():
            if text == address or text.startswith(address + "/"):
                return here + text[len(address) :]
        for mount, directory in deepest_first:
            if text == mount or text.startswith(mount + "/"):
                return str(directory.absolute()) + text[len(mount) :]
        return text

    return rewrite


def inherited() -> dict[str, str]:
    """Our environment, less what configures somebody else: what a container has besides what its manifest says."""
    env = {name: value for name, value in os.environ.items() if not _NOT_INHERITED.match(name)}
    # `python` in a container is the one its packages are installed for.
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    return env


def _readiness(container: Container, *, is_main: bool, declared: int, ports: Mapping[int, int]) -> Probe | None:
    if container.readiness_probe:
        return _probe(container.readiness_probe, declared, ports, every_s=1)
    if not is_main:
        return None
    return _probe(ProbeSpec(), declared, ports, every_s=1)  # Knative's default for the container that is called: its port is open


def _probe(spec: ProbeSpec, declared: int, ports: Mapping[int, int], *, every_s: float) -> Probe:
    target = spec.http_get or spec.tcp_socket
    port = (target and target.port) or declared
    return Probe(
        port=ports.get(port, port),
        path=spec.http_get.path if spec.http_get else None,
        headers={header.name: header.value for header in spec.http_get.http_headers} if spec.http_get else {},
        period_s=spec.period_seconds or every_s,
        timeout_s=spec.timeout_seconds,
        failures=spec.failure_threshold,
        delay_s=spec.initial_delay_seconds,
    )
