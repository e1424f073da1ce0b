"""Who may ask: keys for callers, tokens for those who post to the function's own URL."""

from function.errors import Unauthorized, Unavailable
from function.keys import Keys
from function.settings import FunctionSettings

OPEN = ("/healthz", "/readyz")  # need no key
NOBODY = ""  # who calls where nobody is asked


class Gate:
    """Lets all in unless the settings ask for keys or tokens."""

    def __init__(self, settings: FunctionSettings) -> None:
        """Raises SettingsError."""
        self._keys = Keys(settings.api_keys_file) if settings.api_keys_file else None
        self._senders = None
        if settings.oidc_audience:
            from function.oidc import Senders  # an extra, which not every function has

            self._senders = Senders(settings)

    def check(self, path: str, authorization: str, *, method: str) -> str:
        """Who calls: the same text for the same key or the same subject of tokens. authorization: the header's value.

        Raises Unauthorized, Forbidden, or Unavailable while that cannot be told.
        """
        if self.may_wait(path, method):
            return self._sender(authorization)
        if self._keys and path not in OPEN:
            return self._keys.check(authorization)
        return NOBODY

    def may_wait(self, path: str, method: str = "POST") -> bool:
        """Whether a check may take the time of asking the tokens' issuer."""
        return self._senders is not None and (path, method) == ("/", "POST")

    def _sender(self, authorization: str) -> str:
        """Who has one of the keys, if there are any, or else a token."""
        assert self._senders
        unsure: Unavailable | None = None
        try:
            if self._keys:
                return self._keys.check(authorization)
        except Unauthorized:
            pass
        except Unavailable as error:
            unsure = error
        try:
            return self._senders.check(authorization)
        except Unauthorized:
            if unsure:  # what is no good token may be a key
                raise unsure from None
            raise
