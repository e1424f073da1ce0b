"""What happens, on the terminal, as it happens: a line for each event, and a live line for each pod that is starting."""

import shlex
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TaskID, TextColumn, TransferSpeedColumn

from knative.local.manifest import Service
from knative.local.pod import Pod
from knative.local.revision import Revision

REFRESH_S = 0.1


class Terminal:
    """Prints for a person; without a terminal it prints plain lines and no live ones."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, emoji=False)
        self._bars: dict[str, TaskID] = {}
        self._shown_at = 0.0
        self._phases: dict[str, str] = {}
        self._live = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            DownloadColumn(),
            TransferSpeedColumn(),
            console=self.console,
            transient=True,
            auto_refresh=False,  # refreshed by the events themselves: no thread beside the loop
        )

    def say(self, text: str) -> None:
        """A line outside any service."""
        self.console.print(text, soft_wrap=True)

    def serving(
        self,
        services: Sequence[Service],
        urls: Sequence[str],
        sources: Sequence[Mapping[str, Any]],
        default: Service,
        port: int,
        admin_port: int,
    ) -> None:
        """The platform takes requests. sources: their entries in the status document."""
        self.say("")
        for service, url in zip(services, urls, strict=True):
            scale = service.scale
            standing = "at zero: costs nothing until somebody calls" if not max(scale.initial_scale, scale.min_scale) else "starting"
            self.say(f"  [bold]{service.name}[/]  {url}  [dim]{standing}[/]")
        for source in sources:
            queue = f"queue {source['queue']}" if source["queue"] else "events"
            self.say(f"  [bold]{source['name']}[/]  {escape(queue)} → {escape(source['sink'])}")
        body = default.example
        self.say(f"\n  call it   curl http://127.0.0.1:{port}/ -H 'Content-Type: application/json' -d {escape(shlex.quote(body))}")
        for polled in [source["queue"] for source in sources if source["queue"]][:1]:
            self.say(f"  send it   relight send {polled} --count 10")
        self.say(f"  watch it  http://127.0.0.1:{admin_port}/")
        self.say("  stop      Ctrl-C ends everything that was started\n")

    def starting(self, revision: Revision, pod: Pod, waiting: int) -> None:
        """See Watcher."""
        why = f"{waiting} request{'s' * (waiting != 1)} waiting" if waiting else "wanted before anybody calls"
        self._event(revision, f"starting [bold]{pod.name}[/]: {why}")

    def progress(self, revision: Revision, pod: Pod) -> None:
        """See Watcher."""
        report, phase = pod.report, escape(pod.report.phase or pod.phase)
        if pod.waits_for and self._phases.get(pod.name) != "pending":
            self._phases[pod.name] = "pending"
            self._event(revision, f"[yellow]{pod.name}[/] {escape(pod.waits_for)}")
        if pod.phase != "starting":
            if pod.phase != "pending":
                self._forget(pod)
            return
        if not self.console.is_terminal:
            if phase not in ("starting", "ready", self._phases.get(pod.name)):
                self._phases[pod.name] = phase
                size = f", {report.restored_bytes / 1e6:.1f} of {report.total_bytes / 1e6:.1f} MB of weights" if report.total_bytes else ""
                self._event(revision, f"{pod.name} {phase}{size}")
            return
        if pod.name not in self._bars:
            if not self._bars:
                self._live.start()
            self._bars[pod.name] = self._live.add_task(pod.name, total=None)
        self._live.update(
            self._bars[pod.name], description=f"{pod.name} {phase}", completed=report.restored_bytes, total=report.total_bytes or None
        )
        if (now := time.monotonic()) - self._shown_at > REFRESH_S:
            self._shown_at = now
            self._live.refresh()

    def ready(self, revision: Revision, pod: Pod) -> None:
        """See Watcher."""
        stages = " · ".join(
            f"{escape(name.replace('_', '-'))} {seconds:.2f}" for name, seconds in sorted(pod.stages.items(), key=lambda item: item[1])
        )
        weights = pod.report.weights
        source = f"; {weights.bytes / 1e6:.1f} MB of weights from the {escape(weights.source)}" if weights else ""
        self._event(revision, f"[green]ready after {pod.stages['ready']:.2f} s[/] [dim]({stages}{source})[/]")

    def crashed(self, revision: Revision, pod: Pod, ended: str) -> None:
        """See Watcher."""
        self._event(revision, f"[yellow]{pod.name}[/]: {escape(ended)}")

    def hung(self, revision: Revision, pod: Pod, reason: str) -> None:
        """See Watcher."""
        self._event(revision, f"[red]hangs[/]: {escape(reason)}")

    def failed(self, revision: Revision, reason: str) -> None:
        """See Watcher."""
        self._event(revision, f"[red]failed[/]: {escape(reason)}")

    def gave_up(self, revision: Revision, pod: Pod) -> None:
        """See Watcher."""
        self._event(revision, f"[yellow]{pod.name}[/] is idle and gives its GPU up, which another function needs")

    def at_zero(self, revision: Revision, idle_s: float) -> None:
        """See Watcher."""
        if revision.reachable:
            self._event(revision, f"[cyan]scaled to zero[/], {idle_s:.1f} s after the last request")
        else:
            self._event(revision, f"{revision.name} is gone")

    def about(self, service: str, text: str) -> None:
        """See Watcher."""
        self._tell(service, escape(text))

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bars:
            self._live.stop()

    def _event(self, revision: Revision, text: str) -> None:
        self._tell(revision.service.name, text)

    def _tell(self, service: str, text: str) -> None:
        self.say(f"[dim]{time.strftime('%H:%M:%S')}[/] [bold]{service}[/] {text}")

    def _forget(self, pod: Pod) -> None:
        self._phases.pop(pod.name, None)
        if (bar := self._bars.pop(pod.name, None)) is not None:
            self._live.remove_task(bar)
            if not self._bars:
                self._live.stop()
