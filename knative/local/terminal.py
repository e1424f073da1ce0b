"""What happens, on the terminal, as it happens: a line for each event, and a live line for each pod that is starting.

What others have written (pods, callers, manifests) goes through plain.py, and is never read as markup.
"""

import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO, cast
from weakref import WeakSet

from rich.console import Console
from rich.errors import MarkupError
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TaskID, TextColumn, TransferSpeedColumn
from rich.text import Text

from knative.local.figures import size
from knative.local.manifest import EXAMPLE, Service
from knative.local.patient import PatientStream
from knative.local.plain import block, line
from knative.local.pod import Pod
from knative.local.revision import Revision
from knative.local.series import Repeats
from knative.local.trouble import Trouble

Part = str | tuple[str, str]  # a text, or a text and its style

REFRESH_S = 0.1
SHORT = 60  # characters of a word that a pod has chosen
STAGES = 20  # of a cold start
ENDS, FAILURES, RETURNS = "ends", "failures", "returns"  # kinds of what may come again and again


class Terminal:
    """Prints for a person; without a terminal it prints plain lines and no live ones."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=_output(), highlight=False, emoji=False)
        self._bars: dict[str, TaskID] = {}
        self._shown_at = 0.0
        self._phases: dict[str, str] = {}
        self._repeats = Repeats()
        self._were_ready: WeakSet[Pod] = WeakSet()
        self._is_serving = False  # from then on every line has the time
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
        """A line outside any Service, in rich's markup: whatever others have written is to be escaped."""
        try:
            said = Text.from_markup(line(text))
        except MarkupError:
            said = Text(line(text))
        self._print(said)

    def note(self, text: str) -> None:
        """A line outside any Service, as it is."""
        self._print(Text(block(text)))

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
        self.note("")
        for service, url in zip(services, urls, strict=True):
            scale = service.scale
            standing = "at zero: costs nothing until somebody calls" if not max(scale.initial_scale, scale.min_scale) else "starting"
            self._parts("  ", (service.name, "bold"), "  ", url, "  ", (standing, "dim"))
        for source in sources:
            queue = f"queue {source['queue']}" if source["queue"] else "events"
            self._parts("  ", (source["name"], "bold"), "  ", queue, " → ", source["sink"])
        self.note("")
        body = shlex.quote(_on_one_line(default.example)) if default.has_example else """'{"instances": [INPUT]}'"""
        self.note(f"  call it   curl http://127.0.0.1:{port}/ -H 'Content-Type: application/json' -d {body}")
        if not default.has_example:
            self.note(f"            with what {default.name} takes; one that is to stand here: annotation {EXAMPLE}, or --example")
        for polled in [source["queue"] for source in sources if source["queue"]][:1]:
            self.note(f"  send it   relight send {polled} --count 10")
        self.note(f"  watch it  http://127.0.0.1:{admin_port}/")
        self.note("  stop      Ctrl-C ends everything that was started")
        self.note("")
        self._is_serving = True

    def starting(self, revision: Revision, pod: Pod, waiting: int) -> None:
        """See Watcher."""
        why = f"{waiting} request{'s' * (waiting != 1)} waiting" if waiting else "wanted before anybody calls"
        self._event(revision, "starting ", (pod.name, "bold"), f": {why}")

    def progress(self, revision: Revision, pod: Pod) -> None:
        """See Watcher."""
        report, phase = pod.report, line(pod.report.phase or pod.phase, SHORT)
        if pod.waits_for and self._phases.get(pod.name) != "pending":
            self._phases[pod.name] = "pending"
            self._event(revision, (pod.name, "yellow"), " ", pod.waits_for)
        if pod.phase != "starting":
            if pod.phase != "pending":
                self._forget(pod)
            return
        if not self.console.is_terminal:
            if phase not in ("starting", "ready", "failed", self._phases.get(pod.name)):  # what they mean is told as an event
                self._phases[pod.name] = phase
                moved = f", {size(report.restored_bytes)} of {size(report.total_bytes)} of weights" if report.total_bytes else ""
                self._event(revision, f"{pod.name} {phase}{moved}")
            return
        if pod.name not in self._bars:
            if not self._bars:
                self._live.start()
            self._bars[pod.name] = self._live.add_task(escape(line(pod.name)), total=None)
        self._live.update(
            self._bars[pod.name],
            description=escape(f"{line(pod.name)} {phase}"),
            completed=report.restored_bytes,
            total=report.total_bytes or None,
        )
        if (now := time.monotonic()) - self._shown_at > REFRESH_S:
            self._shown_at = now
            self._live.refresh()

    def ready(self, revision: Revision, pod: Pod) -> None:
        """See Watcher."""
        self._repeats.forget(_subject(revision, FAILURES))
        if pod in self._were_ready:
            self._again(revision, RETURNS, ("ready again", "green"), pod.name)
            return
        self._were_ready.add(pod)
        self._repeats.forget(_subject(revision, ENDS))
        ordered = sorted(pod.stages.items(), key=lambda item: item[1])[:STAGES]
        stages = " · ".join(f"{line(name.replace('_', '-'), SHORT)} {seconds:.2f}" for name, seconds in ordered)
        weights = pod.report.weights
        source = f"; {size(weights.bytes)} of weights from the {line(weights.source, SHORT)}" if weights else ""
        self._event(revision, (f"ready after {pod.stages['ready']:.2f} s", "green"), " ", (f"({stages}{source})", "dim"))

    def crashed(self, revision: Revision, pod: Pod, ended: str) -> None:
        """See Watcher."""
        self._again(revision, ENDS, (pod.name, "yellow"), ended)

    def hung(self, revision: Revision, pod: Pod, reason: str) -> None:
        """See Watcher."""
        self._again(revision, ENDS, ("hangs", "red"), reason)

    def failed(self, revision: Revision, trouble: Trouble) -> None:
        """See Watcher."""
        self._again(revision, FAILURES, ("failed", "red"), trouble.whole)

    def gave_up(self, revision: Revision, pod: Pod) -> None:
        """See Watcher."""
        self._event(revision, (pod.name, "yellow"), " is idle and gives its GPU up, which another function needs")

    def at_zero(self, revision: Revision, idle_s: float) -> None:
        """See Watcher."""
        if revision.reachable:
            self._event(revision, ("scaled to zero", "cyan"), f", {idle_s:.1f} s after the last request")
        else:
            self._event(revision, f"{revision.name} is gone")

    def about(self, service: str, text: str) -> None:
        """See Watcher."""
        self._tell(service, text)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bars:
            self._live.stop()
        if isinstance(self.console.file, PatientStream):
            self.console.file.close()

    def _again(self, revision: Revision, kind: str, what: Part, text: str) -> None:
        """Something that may come again and again, as in a crash loop; whoever reads that a pod has ended reads that it is back."""
        if told := self._repeats.add(time.monotonic(), _subject(revision, kind), text):
            if kind != RETURNS:
                self._repeats.forget(_subject(revision, RETURNS))
            self._event(revision, what, ": ", told)

    def _event(self, revision: Revision, *parts: Part) -> None:
        self._tell(revision.service.name, *parts)

    def _tell(self, service: str, *parts: Part) -> None:
        self._parts((_clock(), "dim"), " ", (service, "bold"), " ", *parts)

    def _parts(self, *parts: Part) -> None:
        """One event: what follows its first line is set off."""
        shown = [(part, "") if isinstance(part, str) else part for part in parts]
        self.console.print(Text.assemble(*((block(text), style) for text, style in shown)), soft_wrap=True)

    def _print(self, text: Text) -> None:
        """A line outside any Service: what is said at the start has no time."""
        self.console.print(Text.assemble((_clock(), "dim"), " ", text) if self._is_serving else text, soft_wrap=True)

    def _forget(self, pod: Pod) -> None:
        self._phases.pop(pod.name, None)
        if (bar := self._bars.pop(pod.name, None)) is not None:
            self._live.remove_task(bar)
            if not self._bars:
                self._live.stop()


def _output() -> TextIO:
    try:
        return cast(TextIO, PatientStream(sys.stdout))
    except (OSError, ValueError):
        return sys.stdout  # it has no descriptor


def _clock() -> str:
    return time.strftime("%H:%M:%S")


def _subject(revision: Revision, kind: str) -> str:
    return f"{revision.name} {kind}"


def _on_one_line(body: str) -> str:
    """The same JSON, to be copied into a command."""
    try:
        return json.dumps(json.loads(body), ensure_ascii=False) if "\n" in body else body
    except ValueError:
        return line(body, len(body))
