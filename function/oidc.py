"""Who posts to `/`: the check of the token that Knative Eventing's senders carry, a JWT for the audience of the receiver.

The issuer is the cluster, or any other that publishes its keys as OpenID Connect Discovery 1.0 has it: a document at
`<issuer>/.well-known/openid-configuration` names the issuer and where its keys are (a JWK set, RFC 7517). What is checked follows RFC 7519
and RFC 8725: signature, issuer, audience, times, subject. Nothing is believed before the signature holds, and nothing is accepted while
the keys cannot be had.

This module is imported only where FUNCTION_OIDC_AUDIENCE is set: what it needs is an extra, and takes its time to import.
"""

import ipaddress
import logging
import math
import ssl
import threading
import time
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import orjson

from function.errors import Forbidden, Unauthorized, Unavailable
from function.settings import CLUSTER_ISSUER, FunctionSettings
from weights_cache.environment import SettingsError, told

try:
    import jwt
    from jwt.algorithms import ECAlgorithm, RSAAlgorithm
except ImportError as error:  # the second one is what fails without `cryptography`
    raise SettingsError("FUNCTION_OIDC_AUDIENCE is set, but PyJWT is not installed: pip install 'relight[oidc]'") from error

POD = Path("/var/run/secrets/kubernetes.io/serviceaccount")  # where a pod finds the cluster's certificate and a token of its own
LEEWAY_S = 10.0  # by which clocks may differ
TIMEOUT_S = 2.0  # for each thing that the issuer is to do: connect, begin its answer, go on with it
FRESH_S = 300.0  # then the keys are fetched again
KEPT_S = 3600.0  # as long they are used while that fails
AGAIN_S = 5.0  # between two fetches, however many ask

_MAX_BYTES = 1 << 20
_PUBLIC = ("kty", "n", "e", "crv", "x", "y")  # of a key in a set; should a private part be there, it is left alone
_ALGORITHMS = ("RS256", "ES256")

log = logging.getLogger("relight.function")


@dataclass(frozen=True)
class _Keys:
    """What an issuer calls itself, and its public keys by their ids, each with the one algorithm that it is for."""

    issuer: str
    by_id: dict[str, tuple[str, Any]]
    fetched_at: float


class Senders:
    """Lets in those who have a token of the issuer for our audience, and of them those whom FUNCTION_OIDC_SUBJECTS names."""

    def __init__(self, settings: FunctionSettings, pod: Path = POD) -> None:
        """pod: the folder that may hold `ca.crt` and `token`. Raises SettingsError for an issuer that cannot be asked safely."""
        self._audience = settings.oidc_audience
        self._subjects = frozenset(name.strip() for name in (settings.oidc_subjects or "").split(",")) - {""}
        self._issuer = Issuer(settings.oidc_issuer, pod)

    def check(self, authorization: str) -> str:
        """Who has the token in the header's value: its issuer and subject.

        Raises Unauthorized if it is not good, Forbidden if it is of a subject that is not let in, Unavailable while that cannot be told.
        """
        kind, _, token = authorization.partition(" ")
        if kind.lower() != "bearer" or not token:
            raise Unauthorized("who posts to / needs a token: send Authorization: Bearer <token>")
        try:
            issuer, subject = self._sender(token.strip())
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError) as error:  # the last three: claims of a kind that none should be
            raise Unauthorized(f"the token is not accepted: {_plain(str(error))}") from None
        if self._subjects and subject not in self._subjects:
            raise Forbidden(f"{_plain(subject)} is not let in here (FUNCTION_OIDC_SUBJECTS)")
        return f"subject:{issuer} {subject}"

    def _sender(self, token: str) -> tuple[str, str]:
        """A good token's issuer and subject."""
        header = jwt.get_unverified_header(token)
        if header.get("alg") not in _ALGORITHMS:
            raise Unauthorized(f"the token is not accepted: it must be signed with {' or '.join(_ALGORITHMS)}")
        if not (key_id := header.get("kid")):
            raise Unauthorized("the token is not accepted: it does not say with which key it is signed (kid)")
        keys = self._issuer.keys(key_id)
        if key_id not in keys.by_id:
            raise Unauthorized("the token is not accepted: its issuer has no key of that id (kid)")
        algorithm, key = keys.by_id[key_id]
        claims = jwt.decode(
            token,
            key,
            algorithms=[algorithm],
            audience=self._audience,
            issuer=keys.issuer,
            leeway=LEEWAY_S,
            options={"require": ["exp", "iss", "aud", "sub"], "enforce_minimum_key_length": True},
        )
        return keys.issuer, str(claims["sub"])


class Issuer:
    """An issuer's keys: fetched when they are first needed, again when they are old, and when a token names one that is not among them."""

    def __init__(self, url: str, pod: Path) -> None:
        """Raises SettingsError for a URL that is not https; http is fine on loopback."""
        try:
            _address(url)
        except ValueError as error:
            raise SettingsError(f"FUNCTION_OIDC_ISSUER={told(url)}: {error}") from None
        self._url = url
        self._pod = pod
        self._known: _Keys | None = None
        self._fetching = threading.Lock()
        self._tried_at = -math.inf

    def keys(self, key_id: str) -> _Keys:
        """The issuer's keys, with `key_id` among them if the issuer has it. Raises Unavailable when they cannot be had."""
        known, now = self._known, time.monotonic()
        has_it = known is not None and key_id in known.by_id
        if known and has_it and now - known.fetched_at <= FRESH_S:
            return known
        usable = known if known and has_it and now - known.fetched_at <= KEPT_S else None
        if not self._fetching.acquire(timeout=0 if usable else TIMEOUT_S):
            if usable:
                return usable
            raise Unavailable("the keys of the token's issuer are still being fetched", 1)
        try:
            if self._known and self._known is not known:
                return self._known  # another one's fetch, which ended while we waited
            wait_s = self._tried_at + AGAIN_S - time.monotonic()
            if wait_s > 0:
                if usable:
                    return usable
                raise Unavailable("whether the token is good cannot be told now; its issuer's keys are fetched again soon", wait_s)
            return self._fetch(usable)
        finally:
            self._fetching.release()

    def _fetch(self, usable: _Keys | None) -> _Keys:
        """The keys as the issuer has them now, or `usable`. Raises Unavailable without either."""
        try:
            found = self._ask()
        except (OSError, HTTPException, ValueError) as error:
            self._tried_at = time.monotonic()
            log.warning("the keys of the issuer %s could not be fetched: %s", self._url, str(error) or type(error).__name__)
            if usable:
                return usable
            raise Unavailable("the keys of the token's issuer cannot be fetched; the function's log says why", AGAIN_S) from None
        if self._known:  # the first fetch makes nobody wait for the second
            self._tried_at = time.monotonic()
        self._known = found
        return found

    def _ask(self) -> _Keys:
        document = self._get(self._url.rstrip("/") + "/.well-known/openid-configuration")
        issuer, where = document.get("issuer"), document.get("jwks_uri")
        if not isinstance(issuer, str) or not isinstance(where, str):
            raise ValueError("its discovery document names no `issuer` or no `jwks_uri`")
        # Every cluster answers to one address, and calls itself as its operator chose; Knative's own receivers take that name, too.
        if issuer != self._url and self._url != CLUSTER_ISSUER:
            raise ValueError(f"it calls itself {_plain(issuer)!r}; set FUNCTION_OIDC_ISSUER to that if it is the one")
        by_id = _by_id(self._get(where).get("keys"))
        if not by_id:
            raise ValueError(f"{_plain(where)} has no key for {' or '.join(_ALGORITHMS)} that has an id")
        return _Keys(issuer, by_id, time.monotonic())

    def _get(self, url: str) -> dict[str, Any]:
        """A JSON object.

        A cluster may keep its keys for those whom it knows, so the pod's own token goes along, but only to a server with a certificate of
        the cluster. Any other is asked without, and has one that the system trusts.
        """
        address = _address(url)
        if address.scheme == "http":
            return _read(HTTPConnection(address.hostname or "", address.port, timeout=TIMEOUT_S), address, {})
        if (certificate := self._pod / "ca.crt").exists():
            context = ssl.create_default_context(cafile=certificate)
            context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # which clusters' certificates often are not good enough for
            token = self._pod / "token"  # read each time: it is replaced before it expires
            headers = {"Authorization": f"Bearer {token.read_text().strip()}"} if token.exists() else {}
            try:
                return _read(HTTPSConnection(address.hostname or "", address.port, timeout=TIMEOUT_S, context=context), address, headers)
            except ssl.SSLCertVerificationError:
                pass  # not the cluster's
        context = ssl.create_default_context()
        return _read(HTTPSConnection(address.hostname or "", address.port, timeout=TIMEOUT_S, context=context), address, {})


def _address(url: str) -> SplitResult:
    """Its parts. Raises ValueError unless it is https, or http on loopback."""
    parts = urlsplit(url)
    if not parts.hostname or parts.query or parts.fragment or parts.username is not None or parts.port == 0:
        raise ValueError("must be https://host[:port][/path]")
    if parts.scheme != "https" and not (parts.scheme == "http" and _is_loopback(parts.hostname)):
        raise ValueError("must be https; http is only for a host on loopback")
    return parts


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read(connection: HTTPConnection, address: SplitResult, headers: dict[str, str]) -> dict[str, Any]:
    """What a GET answers: a JSON object with status 200; no redirection is followed."""
    try:
        connection.request("GET", address.path or "/", headers={"Accept": "application/json"} | headers)
        response = connection.getresponse()
        body = response.read(_MAX_BYTES + 1)
    finally:
        connection.close()
    if response.status != 200:
        raise ValueError(f"{address.geturl()} answers {response.status}")
    if len(body) > _MAX_BYTES:
        raise ValueError(f"{address.geturl()} answers with more than {_MAX_BYTES} bytes")
    document = orjson.loads(body)
    if not isinstance(document, dict):
        raise ValueError(f"{address.geturl()} does not answer with a JSON object")
    return document


def _by_id(keys: Any) -> dict[str, tuple[str, Any]]:
    """Those of a key set that are of use here; a set may hold others, of kinds yet unknown (RFC 7517, section 5)."""
    found: dict[str, tuple[str, Any]] = {}
    for key in keys if isinstance(keys, list) else ():
        if not isinstance(key, dict) or not isinstance(key.get("kid"), str) or key.get("use", "sig") != "sig":
            continue
        public = {name: key[name] for name in _PUBLIC if name in key}
        try:
            if key.get("kty") == "RSA" and key.get("alg", "RS256") == "RS256":
                found[key["kid"]] = ("RS256", RSAAlgorithm.from_jwk(public))
            elif key.get("kty") == "EC" and key.get("crv") == "P-256" and key.get("alg", "ES256") == "ES256":
                found[key["kid"]] = ("ES256", ECAlgorithm.from_jwk(public))
        except (jwt.PyJWTError, ValueError, TypeError):
            log.warning("a key of the token's issuer is malformed: %.200r", key["kid"])
    return found


def _plain(text: str) -> str:
    """As it can be told: what comes from a token may hold what JSON cannot say."""
    return text[:200].encode("ascii", "backslashreplace").decode()
