"""From the template of a Service or a source to the processes of one pod: commands, environments, directories, ports, probes.

Starts nothing.
"""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from knative.local.errors import ManifestError, PlatformError
from knative.local.hidden import hidden
from knative.local.inheritance import inherited
from knative.local.limits import NO_LIMITS, Limits
from knative.local.manifest import OBJECT_STORE, Manifests, QueueSource, Service
from knative.local.procfs import MARK
from knative.local.queues import EMBEDDED
from knative.local.rules import AnyContainer
from knative.local.schema import CPU, MEMORY, ProbeSpec
from knative.local.seeds import Seeds

# Two pods share this machine's ports, which in a cluster they would not.
SIDECAR_PORT, DEFAULT_SIDECAR_PORT = "WEIGHTS_PORT", 8090
_PORT_SETTINGS = {SIDECAR_PORT, "FUNCTION_METRICS_PORT"}
# Our programs, as commands have them.
FUNCTION, SIDECAR = ("-m", "function"), ("weights_cache", "serve")
AGENT, AGENT_PATH = "FUNCTION_AGENT", "FUNCTION_AGENT_PATH"
WEIGHTS, ENDPOINT = "WEIGHTS_URI", "AWS_ENDPOINT_URL"
# Which queue a queue source polls, and where it tells of its work.
QUEUE_URL, QUEUE_PORT = "QUEUE_SOURCE_URL", "QUEUE_SOURCE_PORT"
LOOPBACK = "127.0.0.1"
# Where our own programs listen. In a cluster that is the pod's own network; on this machine it would be everybody's.
HOSTS = ("FUNCTION_HOST", "WEIGHTS_HOST", "QUEUE_SOURCE_HOST")
_TELLS = "FUNCTION_TELL_FAILURE_S"  # how Knative's callers learn of a failed start; here the platform tells them
LONGEST_GRACE_S = 30.0  # that a source has for what it holds: in a cluster nobody sits and waits for it

# For containers that have no requests any more; so short that nothing on the way of a Ctrl-C takes long, even if all of it hangs.
STOP_GRACE_S = 5.0

Workload = Service | QueueSource


@dataclass(frozen=True)
class Probe:
    """A probe of a process; `port` is the local one. With a `command` that is run instead, and ends with status 0 if all is well."""

    port: int
    path: str | None  # None: a TCP connect is enough
    headers: Mapping[str, str]
    period_s: float
    timeout_s: float
    failures: int  # in a row until it counts as failed
    delay_s: float  # since the process started
    successes: int = 1  # in a row until it counts as well
    command: tuple[str, ...] = ()


@dataclass(frozen=True)
class Process:
    """One container as a process to start. `directories` are its volumes, to be made first."""

    container: str
    is_main: bool  # the one that is called
    argv: tuple[str, ...] = dataclasses.field(repr=False)  # which may hold secrets, as what follows does
    env: Mapping[str, str] = dataclasses.field(repr=False)
    cwd: Path | None
    directories: tuple[Path, ...]
    log: Path
    readiness: Probe | None
    liveness: Probe | None
    startup: Probe | None = None  # until it has succeeded the others are not asked
    limits: Limits = NO_LIMITS


@dataclass(frozen=True)
class PodPlan:
    """What one pod is made of. `port`: where its main container listens, 0 if it does not. `grace_s`: from SIGTERM to SIGKILL."""

    port: int
    processes: tuple[Process, ...]
    grace_s: float = STOP_GRACE_S

    @property
    def gpus(self) -> int:
        """Devices that the pod has for itself."""
        return sum(process.limits.gpus for process in self.processes)


@dataclass(frozen=True)
class Places:
    """What is this machine's own: where things lie, and what processes inherit."""

    state_dir: Path
    mark: str = ""  # what the mark of every process begins with that was started for this state directory, and of no other
    inherits: tuple[str, ...] = ()  # names of our environment's variables, besides those that are always inherited

    def pod(self, name: str) -> Path:
        """What lives as long as the pod."""
        return self.state_dir / "pods" / name

    def log(self, service: Workload, pod: str, container: str) -> Path:
        """A container's output; kept when the pod is gone."""
        return self.state_dir / "logs" / service.namespace / pod / f"{container}.log"

    def volume(self, service: Workload, pod: str, name: str) -> Path:
        """A volume's directory: the pod's own for emptyDir; for the other kinds one that all pods share and that is kept."""
        source = next(volume for volume in service.spec.volumes if volume.name == name)
        if source.persistent_volume_claim:
            return self.state_dir / "volumes" / service.namespace / source.persistent_volume_claim.claim_name
        if source.host_path:
            return self.state_dir / "host" / source.host_path.path.lstrip("/")
        return self.pod(pod) / "volumes" / name


def check_references(manifests: Manifests) -> None:
    """Raises ManifestError for a reference to a ConfigMap or Secret that is not there, and for what no process can be told."""
    for workload in manifests.workloads:
        containers: Sequence[AnyContainer] = workload.spec.containers
        for index, container in enumerate(containers):
            told = {f"env: {name}": value for name, value in declared_env(workload, index, manifests).items()}
            told |= {"command": "".join(container.command), "args": "".join(container.args)}
            for field, text in told.items():
                if "\0" in field + text:  # a secret perhaps, so it is not repeated
                    where = f"{workload.where}: spec.template.spec.containers[{index}].{field}"
                    raise ManifestError(workload.file, where, "holds a NUL character, which no process can be told")


def plan_pod(
    service: Service,
    *,
    revision: str,
    pod: str,
    places: Places,
    manifests: Manifests,
    free_port: Callable[[], int],
    addresses: Mapping[str, str],
    seeds: Seeds | None = None,
) -> PodPlan:
    """The processes of one new pod.

    free_port: called for each port of the pod. addresses: what a manifest calls an embedded server, and where that is on this machine.
    seeds: what is in the embedded object store. Raises ManifestError for a reference to a ConfigMap or Secret that is not there.
    """
    main = service.user_container
    declared = main.ports[0].container_port if main.ports else 8080
    ports = {declared: free_port()}
    given = {"K_SERVICE": service.name, "K_CONFIGURATION": service.name, "K_REVISION": revision}
    plan = _Plan(service, pod, places, manifests, free_port, addresses, ports, given, seeds or Seeds())
    index = service.spec.containers.index(main)
    return PodPlan(ports[declared], plan.processes(index, {"PORT": str(ports[declared])}, ProbeSpec()))


def plan_source(
    source: QueueSource, *, pod: str, sink: str, places: Places, free_port: Callable[[], int], addresses: Mapping[str, str]
) -> PodPlan:
    """The processes of a source; each is told its sink, an address, as a SinkBinding does it. For the rest see `plan_pod`."""
    given = {"K_SINK": sink}
    if source.declared.ce_overrides.extensions:
        given["K_CE_OVERRIDES"] = json.dumps({"extensions": source.declared.ce_overrides.extensions})
    environments = [declared_env(source, index, source.manifests) for index in range(len(source.spec.containers))]
    index = next((index for index, env in enumerate(environments) if QUEUE_URL in env), 0)
    ports: dict[int, int] = {}
    own: dict[str, str] = {}
    if QUEUE_URL in (env := environments[index]):
        declared = env.get(QUEUE_PORT, "")
        port = free_port()
        ports = {int(declared): port} if declared.isdigit() else {}
        own = {QUEUE_PORT: str(port)}
    plan = _Plan(source, pod, places, source.manifests, free_port, addresses, ports, given)
    return PodPlan(
        int(own.get(QUEUE_PORT, 0)), plan.processes(index, own), min(LONGEST_GRACE_S, source.spec.termination_grace_period_seconds)
    )


@dataclass(frozen=True)
class _Plan:
    """What the processes of one pod have in common. `ports`: the local one for each declared one. `given`: variables that all have."""

    workload: Workload
    pod: str
    places: Places
    manifests: Manifests
    free_port: Callable[[], int]
    addresses: Mapping[str, str]
    ports: dict[int, int]
    given: Mapping[str, str]
    seeds: Seeds = dataclasses.field(default_factory=Seeds)

    def processes(self, main: int, own: Mapping[str, str], default: ProbeSpec | None = None) -> tuple[Process, ...]:
        """All of them. main: the index of the one that has the variables `own`, and `default` for want of a readiness probe."""
        containers: Sequence[AnyContainer] = self.workload.spec.containers
        for container in containers:
            for port in _own_ports(container) | ({self._sidecar_port} if self._sidecar_port else set()):
                if port not in self.ports:
                    self.ports[port] = self.free_port()
        return tuple(
            self._process(index, container, own if index == main else {}, default if index == main else None, is_main=index == main)
            for index, container in enumerate(containers)
        )

    @cached_property
    def _sidecar_port(self) -> int:
        """Where our sidecar listens in a cluster; 0 without one. Its default, too, is two pods' here."""
        containers: Sequence[AnyContainer] = self.workload.spec.containers
        for index, container in enumerate(containers):
            if runs(container, SIDECAR):
                declared = declared_env(self.workload, index, self.manifests).get(SIDECAR_PORT, "")
                return int(declared) if declared.isdigit() else DEFAULT_SIDECAR_PORT
        return 0

    def _process(self, index: int, container: AnyContainer, own: Mapping[str, str], default: ProbeSpec | None, *, is_main: bool) -> Process:
        workload, ports = self.workload, self.ports
        mounts = {
            mount.mount_path.rstrip("/"): self.places.volume(workload, self.pod, mount.name) / mount.sub_path
            for mount in container.volume_mounts
        }
        env = declared_env(workload, index, self.manifests)
        env = {
            name: str(ports.get(int(value), value)) if name.endswith("_PORT") and value.isdigit() else value for name, value in env.items()
        }
        env |= {**own, **self.given}
        if self._sidecar_port and SIDECAR_PORT not in env and (runs(container, SIDECAR) or runs(container, FUNCTION)):
            env[SIDECAR_PORT] = str(ports[self._sidecar_port])
        here = rewriter(mounts, self.addresses)
        env = {name: here(value) for name, value in env.items()}
        if isinstance(workload, Service):
            env |= self._own_model(workload, container, env, here)
        if _TELLS in env:
            env[_TELLS] = "0"
        argv = tuple(_expand(here(word), env) for word in (*container.command, *container.args))
        cwd = Path(here(container.working_dir)) if container.working_dir else None
        if (hides := hidden(argv, cwd)) and not env.get("PYTHONSAFEPATH"):
            raise PlatformError(f"{hides} hides Relight's own package of that name from {container.name}; give it another name")
        limits = _limits(container)
        env |= _threads(env, limits) | {MARK: f"{self.places.mark}{workload.namespace}/{self.pod}/{container.name}/"}
        probe = partial(_probe, container=container, ports=ports, here=here)
        return Process(
            container=container.name,
            is_main=is_main,
            argv=argv,
            env=inherited(self.places.inherits) | env | {name: LOOPBACK for name in HOSTS if not env.get(name)},
            cwd=cwd,
            directories=tuple(mounts.values()),
            log=self.places.log(workload, self.pod, container.name),
            readiness=probe(container.readiness_probe or default, every_s=1),
            liveness=probe(container.liveness_probe, every_s=10),
            startup=probe(container.startup_probe, every_s=10),
            limits=limits,
        )

    def _own_model(self, service: Service, container: AnyContainer, env: Mapping[str, str], here: Callable[[str], str]) -> dict[str, str]:
        """What our programs are told of this machine besides: where the agent is looked for, and where seeded weights are."""
        is_function, is_sidecar = runs(container, FUNCTION), runs(container, SIDECAR)
        told = set(env) | set(self.places.inherits)
        found = {AGENT_PATH: agent_path(service, container, here)} if is_function and AGENT_PATH not in told else {}
        uri = env.get(WEIGHTS, "")
        if not (is_function or is_sidecar) or not self.seeds.of(uri):
            return found
        if is_sidecar and ENDPOINT not in told and OBJECT_STORE in self.addresses:
            found |= EMBEDDED | {ENDPOINT: self.addresses[OBJECT_STORE]}
        return found | {WEIGHTS: self.seeds.pinned(uri, service.weights)}


def agent_path(service: Service, container: AnyContainer, here: Callable[[str], str]) -> str:
    """Where an agent's module is looked for: as ever in the working directory, then beside the manifest, and where we were started."""
    with contextlib.suppress(FileNotFoundError):  # somebody has removed the directory that we are in
        started_in = Path.cwd()
        folders = [started_in / here(container.working_dir)] if container.working_dir else []
        folders += [(started_in / service.file).parent, started_in]
        return os.pathsep.join(dict.fromkeys(str(folder) for folder in folders if os.pathsep not in str(folder)))
    return ""


def runs(container: AnyContainer, program: tuple[str, ...]) -> bool:
    """Whether a container's command is one of our programs."""
    words = (*container.command, *container.args)
    return any(words[at : at + len(program)] == program for at in range(len(words)))


def _own_ports(container: AnyContainer) -> set[int]:
    """Ports that a variable tells the container to open: those that its probes ask, and those of our own programs.

    A port that is probed and named by no variable is fixed in the program, and cannot be moved.
    """
    probes = (container.liveness_probe, container.readiness_probe, container.startup_probe)
    targets = [probe.http_get or probe.tcp_socket for probe in probes if probe]
    asked = {target.port for target in targets if target and isinstance(target.port, int)}
    told = [
        (variable.name, int(variable.value)) for variable in container.env if variable.name.endswith("_PORT") and variable.value.isdigit()
    ]
    return {port for name, port in told if name in _PORT_SETTINGS or port in asked}


def _limits(container: AnyContainer) -> Limits:
    limits = container.resources.limits
    memory = limits.get(MEMORY)
    return Limits(limits.get(CPU) or None, int(memory) if memory else None, container.resources.gpus)


def _threads(env: Mapping[str, str], limits: Limits) -> dict[str, str]:
    """How many threads our function's torch has: what it would find in a cluster's cgroup, but one core is left for everybody else.

    All other libraries see the cores that a container may use. (Not OMP_NUM_THREADS, which would have to agree with the fork server's.)
    """
    if not limits.cpus or "FUNCTION_AGENT" not in env or "FUNCTION_TORCH_THREADS" in env:
        return {}
    return {"FUNCTION_TORCH_THREADS": str(max(1, min(int(limits.cpus), len(os.sched_getaffinity(0)) - 1)))}


def declared_env(service: Workload, index: int, manifests: Manifests) -> dict[str, str]:
    """What a manifest says of a container's environment. Raises ManifestError for a reference to what is not there."""
    env: dict[str, str] = {}
    container = service.spec.containers[index]
    for number, source in enumerate(container.env_from):
        for field, kind, objects, ref in (
            ("configMapRef", "ConfigMap", manifests.config_maps, source.config_map_ref),
            ("secretRef", "Secret", manifests.secrets, source.secret_ref),
        ):
            if ref:
                data = objects.get((service.namespace, ref.name))
                if data is None and not ref.optional:
                    raise _missing(service, f"containers[{index}].envFrom[{number}].{field}", kind, ref.name, objects)
                env |= {source.prefix + key: value for key, value in (data or {}).items()}
    for number, variable in enumerate(container.env):
        value: str | None = variable.value
        if variable.value_from:
            for field, kind, objects, key in (
                ("configMapKeyRef", "ConfigMap", manifests.config_maps, variable.value_from.config_map_key_ref),
                ("secretKeyRef", "Secret", manifests.secrets, variable.value_from.secret_key_ref),
            ):
                if key:
                    value = objects.get((service.namespace, key.name), {}).get(key.key)
                    if value is None and not key.optional:
                        at = f"containers[{index}].env[{number}].valueFrom.{field}"
                        raise _missing(service, at, kind, key.name, objects, key.key)
        if value is not None:
            env[variable.name] = _expand(value, env)
    return env


def _missing(
    service: Workload, path: str, kind: str, name: str, objects: Mapping[tuple[str, str], Mapping[str, str]], key: str | None = None
) -> ManifestError:
    held = objects.get((service.namespace, name))
    if held is not None:
        message = f"{kind} {name} has no key {key!r}; it has {', '.join(sorted(held)) or 'none'}"
    else:
        there = ", ".join(sorted(other for space, other in objects if space == service.namespace)) or "none"
        message = f"found {kind} {name!r}, which is in no manifest here; in namespace {service.namespace} there are {there}"
    return ManifestError(service.file, f"{service.where}: spec.template.spec.{path}", message)


def _expand(text: str, env: Mapping[str, str]) -> str:
    """Kubernetes' `$(NAME)`; a name that is not set stays as it is, and `$$` is one `$`, also before a bracket."""
    return re.sub(r"\$\$|\$\(([^)]*)\)", lambda match: "$" if match[0] == "$$" else env.get(match[1], match[0]), text)


def rewriter(mounts: Mapping[str, Path], addresses: Mapping[str, str]) -> Callable[[str], str]:
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


def _probe(
    spec: ProbeSpec | None, *, container: AnyContainer, ports: Mapping[int, int], here: Callable[[str], str], every_s: float
) -> Probe | None:
    if spec is None:
        return None
    target = spec.http_get or spec.tcp_socket
    asked = target.port if target else None
    own = [port.container_port for port in container.ports if port.name == asked or not asked]
    port = asked if asked and isinstance(asked, int) else next(iter(own), 8080)
    return Probe(
        port=ports.get(port, port),
        path=spec.http_get.path if spec.http_get else None,
        headers={header.name: header.value for header in spec.http_get.http_headers} if spec.http_get else {},
        period_s=spec.period_seconds or every_s,
        timeout_s=spec.timeout_seconds,
        failures=spec.failure_threshold,
        delay_s=spec.initial_delay_seconds,
        successes=spec.success_threshold,
        command=tuple(map(here, spec.exec.command)) if spec.exec else (),
    )
