"""Who may ask: keys for callers, tokens for the senders of events."""

from function.errors import Unauthorized
from function.keys import Keys
from function.settings import FunctionSettings

OPEN = ("/healthz", "/readyz")  # need no key


class Gate:
    """Lets all in unless the settings ask for keys or tokens."""

    def __init__(self, settings: FunctionSettings) -> None:
        """Raises SettingsError."""
        self._keys = Keys(settings.api_keys_file) if settings.api_keys_file else None
        self._senders = None
        if settings.oidc_audience:
            from function.oidc import Senders  # an extra, which not every function has

            self._senders = Senders(settings)

    def check(self, path: str, authorization: str, *, is_event: bool) -> None:
        """Raises Unauthorized, Forbidden, or Unavailable while tokens cannot be judged. authorization: the header's value."""
        if self._senders and is_event:
            if not self._keys or not _has_key(self._keys, authorization):
                self._senders.check(authorization)
        elif self._keys and path not in OPEN:
            self._keys.check(authorization)


def _has_key(keys: Keys, authorization: str) -> bool:
    try:
        keys.check(authorization)
    except Unauthorized:
        return False
    return True
