"""Why something does not come up."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Trouble:
    """What keeps a pod from being ready. Anybody may know the reason; the log is for whoever runs the platform."""

    reason: str  # in one line, without anything of a log
    container: str = ""  # the one that is to blame, if one is
    lines: tuple[str, ...] = ()  # the last of its log

    @property
    def whole(self) -> str:
        """The reason, and the log below it."""
        if not self.lines:
            return self.reason
        return "\n".join([self.reason, f"the last lines of {self.container}:", *(f"  {text}" for text in self.lines)])

    def log(self) -> dict[str, object] | None:
        """The log, in `/api/status`."""
        return {"container": self.container, "lines": list(self.lines)} if self.container else None
