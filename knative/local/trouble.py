"""Why something does not come up."""

from dataclasses import dataclass

SHORT = 20  # characters, of a text that may be in another by chance


@dataclass(frozen=True)
class Trouble:
    """What keeps a pod from being ready. Anybody may know the reason; the log is for whoever runs the platform."""

    reason: str  # in one line, without anything of a log
    container: str = ""  # the one that is to blame, if one is
    lines: tuple[str, ...] = ()  # the last of its log

    @property
    def whole(self) -> str:
        """The reason, and the log below it, without what the reason says already."""
        news = [text for text in self.lines if not self._says(text)]
        if not news:
            return self.reason
        return "\n".join([self.reason, f"the last lines of {self.container}:", *(f"  {text}" for text in news)])

    def _says(self, text: str) -> bool:
        """Whether a line of the log is in the reason, but for what may begin it (`2026-01-31 09:12:59 ERROR relight.function: `)."""
        parts = text.split(": ")
        told = [": ".join(parts[at:]).strip() for at in range(len(parts))]
        return any(len(words) >= SHORT and words in self.reason for words in told)

    def log(self) -> dict[str, object] | None:
        """The log, in `/api/status`."""
        return {"container": self.container, "lines": list(self.lines)} if self.container else None
