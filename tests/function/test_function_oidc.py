"""Tokens of event senders, checked against an issuer that is really there: an HTTP server on loopback with keys made here."""

import base64
import hashlib
import hmac
import ipaddress
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from flask.testing import FlaskClient
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm, RSAAlgorithm
from werkzeug.test import TestResponse

from function import oidc
from function.agent import Weights
from function.app import create_app
from function.errors import Unauthorized, Unavailable
from function.gate import Gate
from function.model import Model
from function.oidc import Senders
from function.settings import FunctionSettings
from tests.support import BIN, clean_environment, free_port, request, running, wait_until
from weights_cache.environment import SettingsError
from weights_cache.settings import WeightsSettings

AUDIENCE = "functions/default/echo"
SENDER = "system:serviceaccount:default:a-source"
EVENT = {"ce-specversion": "1.0", "ce-id": "1", "ce-source": "/s", "ce-type": "t", "Content-Type": "application/json"}
RSA = rsa.generate_private_key(65537, 2048)
EC = ec.generate_private_key(ec.SECP256R1())
OTHER = rsa.generate_private_key(65537, 2048)
PATHS = ["/.well-known/openid-configuration", "/openid/v1/jwks"]  # in the order in which they are asked for


def rsa_key(key: rsa.RSAPrivateKey, key_id: str, **more: Any) -> dict[str, Any]:
    return RSAAlgorithm.to_jwk(key.public_key(), as_dict=True) | {"kid": key_id, "use": "sig", "alg": "RS256"} | more


def ec_key(key: ec.EllipticCurvePrivateKey, key_id: str) -> dict[str, Any]:
    return ECAlgorithm.to_jwk(key.public_key(), as_dict=True) | {"kid": key_id, "use": "sig", "alg": "ES256"}


class Issuer:
    """Publishes keys as a cluster does. Each attribute may be changed while it runs."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.asked.append(self.path)
                issuer.authorizations.append(self.headers["Authorization"])
                issuer.waiting += 1
                assert issuer.may_answer.wait(100)
                issuer.waiting -= 1
                body = json.dumps(issuer.documents().get(self.path)).encode() if issuer.body is None else issuer.body
                self.send_response(401 if issuer.token not in (None, self.headers["Authorization"]) else issuer.status)
                for name, value in {"Content-Length": str(len(body)), **issuer.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, *args: Any) -> None:
                """Who asks may leave early."""

        self.asked: list[str] = []
        self.waiting = 0  # those who are asking for something that it does not give yet
        self.authorizations: list[str | None] = []
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.status = 200
        self.body: bytes | None = None
        self.headers: dict[str, str] = {}
        self.token: str | None = None  # the only one that it answers to
        self.keys: list[Any] = [rsa_key(RSA, "first"), ec_key(EC, "second")]
        self._server = Quiet(("127.0.0.1", 0), Handler)
        if context:
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = self.name = f"{'https' if context else 'http'}://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def documents(self) -> dict[str, Any]:
        return {PATHS[0]: {"issuer": self.name, "jwks_uri": self.url + PATHS[1]}, PATHS[1]: {"keys": self.keys}}

    def token_of(self, key: Any = RSA, key_id: str | None = "first", algorithm: str = "RS256", **claims: Any) -> str:
        """A token as a cluster makes them. A claim that is None is left out."""
        now = int(time.time())
        found = {"iss": self.name, "aud": [AUDIENCE], "sub": SENDER, "iat": now, "nbf": now, "exp": now + 600} | claims
        said = {name: value for name, value in found.items() if value is not None}
        return jwt.encode(said, key, algorithm, {"kid": key_id} if key_id else {})

    def stop(self) -> None:
        self.may_answer.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    found = Issuer()
    yield found
    found.stop()


MakeClient = Callable[..., FlaskClient]


@pytest.fixture
def make_client(tmp_path: Path, issuer: Issuer) -> MakeClient:
    def make(**settings: Any) -> FlaskClient:
        given_: dict[str, Any] = {"oidc_audience": AUDIENCE, "oidc_issuer": issuer.url, "access_log": False} | settings
        found = FunctionSettings(agent="function.agents.echo:Echo", model_name="echo", **given_)
        model = Model(found, Weights(WeightsSettings(cache_dir=tmp_path)), started_at=time.monotonic())
        model.start(on_failure=lambda _: None)
        wait_until("ready", lambda: model.phase == "ready")
        return create_app(found, model).test_client()

    return make


@pytest.fixture
def client(make_client: MakeClient) -> FlaskClient:
    return make_client()


def send(client: FlaskClient, token: str | None, headers: Mapping[str, str] = EVENT) -> TestResponse:
    """An event to the function, from who has this token."""
    return client.post("/", data=b'"hello"', headers={**headers, **({} if token is None else {"Authorization": f"Bearer {token}"})})


def error_of(answer: TestResponse) -> dict[str, str]:
    found: Any = answer.json
    return dict(found["error"])


def refused(answer: TestResponse) -> str:
    """What somebody is told who is not believed."""
    assert (answer.status_code, error_of(answer)["type"]) == (401, "unauthorized")
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    return error_of(answer)["message"]


def signed_by_hand(header: Any, claims: Any, sign: Callable[[bytes], bytes]) -> str:
    """A token that no library would make."""
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in (header, claims)]
    return b".".join([*parts, base64.urlsafe_b64encode(sign(b".".join(parts))).rstrip(b"=")]).decode()


# Who is let in


def test_an_event_with_a_good_token_is_answered(client: FlaskClient, issuer: Issuer) -> None:
    answer = send(client, issuer.token_of())
    assert (answer.status_code, answer.json, answer.headers["ce-type"]) == (200, "hello", "t.response")
    assert send(client, issuer.token_of(EC, "second", "ES256")).status_code == 200
    assert send(client, issuer.token_of(aud=AUDIENCE)).status_code == 200
    assert issuer.asked == PATHS


def test_an_event_without_a_token_is_refused_in_each_mode(client: FlaskClient, issuer: Issuer) -> None:
    for headers in (EVENT, {"Content-Type": "application/cloudevents+json"}, {"Content-Type": "application/cloudevents-batch+json"}):
        assert refused(send(client, None, headers)) == "who posts to / needs a token: send Authorization: Bearer <token>"
    assert issuer.asked == []


def test_plain_json_at_the_functions_own_url_needs_a_token_too(client: FlaskClient, issuer: Issuer) -> None:
    plain = {"Content-Type": "application/json"}
    for headers in (plain, {}, {"Content-Type": "text/plain"}, plain | {"ce-id": "1"}):
        refused(send(client, None, headers))
        refused(send(client, issuer.token_of(aud="another"), headers))
    answer = send(client, issuer.token_of(), plain)
    assert (answer.status_code, answer.json) == (200, "hello")


def test_what_is_not_posted_to_the_functions_own_url_needs_no_token(client: FlaskClient, issuer: Issuer) -> None:
    issuer.status = 500
    assert client.get("/").status_code == 405
    assert client.post("/v1/models/echo:predict", json={"instances": [1]}).json == {"predictions": [1]}
    for path in ("/healthz", "/readyz", "/metrics", "/v1/models"):
        assert client.get(path, headers={"Authorization": "Bearer junk"}).status_code == 200
    assert issuer.asked == []


def test_an_event_cannot_pass_for_something_else(client: FlaskClient) -> None:
    for path in ("/?x", "//", "/."):
        answer = client.post(path, data=b"1", headers=EVENT, follow_redirects=True)
        assert answer.status_code in (401, 404), path
    assert client.post("/", data=b"[]", headers={"Content-Type": "Application/CloudEvents-Batch+JSON; charset=utf-8"}).status_code == 401


@pytest.mark.parametrize(
    ("claims", "said"),
    [
        pytest.param({"exp": int(time.time()) - 60}, "Signature has expired", id="expired"),
        pytest.param({"nbf": int(time.time()) + 3600}, "The token is not yet valid (nbf)", id="not yet valid"),
        pytest.param({"iat": int(time.time()) + 3600}, "The token is not yet valid (iat)", id="issued in the future"),
        pytest.param({"aud": ["another"]}, "Audience doesn't match", id="wrong audience"),
        pytest.param({"aud": AUDIENCE + "/"}, "Audience doesn't match", id="nearly our audience"),
        pytest.param({"iss": "https://elsewhere.example"}, "Invalid issuer", id="wrong issuer"),
        pytest.param({"exp": None}, 'Token is missing the "exp" claim', id="without an end"),
        pytest.param({"aud": None}, 'Token is missing the "aud" claim', id="without an audience"),
        pytest.param({"iss": None}, 'Token is missing the "iss" claim', id="without an issuer"),
        pytest.param({"sub": None}, 'Token is missing the "sub" claim', id="without a subject"),
    ],
)
def test_a_token_whose_claims_are_not_ours_is_refused(client: FlaskClient, issuer: Issuer, claims: dict[str, Any], said: str) -> None:
    assert refused(send(client, issuer.token_of(**claims))) == f"the token is not accepted: {said}"


@pytest.mark.parametrize(
    "claims", [{"exp": float("inf")}, {"exp": "9" * 5000}, {"exp": [1]}, {"nbf": {}}, {"aud": [1]}, {"aud": 7}, {"iss": [1]}, {"sub": {}}]
)
def test_claims_of_kinds_that_none_should_be_are_refused(client: FlaskClient, issuer: Issuer, claims: dict[str, Any]) -> None:
    whole = {"iss": issuer.name, "aud": AUDIENCE, "sub": SENDER, "exp": time.time() + 60} | claims
    header = {"alg": "RS256", "kid": "first"}
    sign = RSAAlgorithm(RSAAlgorithm.SHA256).sign
    refused(send(client, signed_by_hand(header, whole, lambda data: sign(data, RSA))))


def test_clocks_may_differ_a_little(client: FlaskClient, issuer: Issuer) -> None:
    now = int(time.time())
    assert send(client, issuer.token_of(exp=now - 3)).status_code == 200
    assert send(client, issuer.token_of(nbf=now + 3, iat=now + 3)).status_code == 200


def test_only_signatures_with_the_issuers_own_keys_count(client: FlaskClient, issuer: Issuer) -> None:
    assert refused(send(client, issuer.token_of(OTHER, "first"))) == "the token is not accepted: Signature verification failed"
    assert refused(send(client, issuer.token_of(RSA, "second"))) == "the token is not accepted: The specified alg value is not allowed"
    header, claims, signature = issuer.token_of().split(".")
    other_claims = issuer.token_of(sub="system:serviceaccount:kube-system:admin").split(".")[1]
    assert refused(send(client, f"{header}.{other_claims}.{signature}")) == "the token is not accepted: Signature verification failed"
    assert refused(send(client, f"{header}.{claims}.")) == "the token is not accepted: Signature verification failed"


def test_a_token_that_is_not_signed_is_refused_without_asking_the_issuer(client: FlaskClient, issuer: Issuer) -> None:
    claims = {"iss": issuer.name, "aud": AUDIENCE, "sub": SENDER, "exp": time.time() + 60}
    for algorithm in ("none", "None", "", None, ["RS256"]):
        refused(send(client, signed_by_hand({"alg": algorithm, "kid": "first"}, claims, lambda data: b"")))
    assert issuer.asked == []


def test_a_public_key_is_no_secret_to_sign_with(client: FlaskClient, issuer: Issuer) -> None:
    claims = {"iss": issuer.name, "aud": AUDIENCE, "sub": SENDER, "exp": time.time() + 60}
    pem = RSA.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    for secret in (pem, pem.strip(), json.dumps(issuer.keys[0]).encode()):
        token = signed_by_hand({"alg": "HS256", "kid": "first"}, claims, lambda data, key=secret: hmac.digest(key, data, hashlib.sha256))  # type: ignore[misc]
        assert refused(send(client, token)) == "the token is not accepted: it must be signed with RS256 or ES256"


def test_keys_that_a_token_brings_along_are_not_used(client: FlaskClient, issuer: Issuer) -> None:
    claims = {"iss": issuer.name, "aud": AUDIENCE, "sub": SENDER, "exp": time.time() + 60}
    own = rsa_key(OTHER, "mine")
    for header in ({"kid": "mine", "jwk": own}, {"kid": "mine", "jku": issuer.url + "/mine"}, {"jwk": own}):
        refused(send(client, jwt.encode(claims, OTHER, "RS256", header)))
    assert "/mine" not in issuer.asked


def test_subjects_that_are_not_named_are_forbidden(make_client: MakeClient, issuer: Issuer) -> None:
    client = make_client(oidc_subjects=f"system:serviceaccount:default:another, {SENDER},")
    assert send(client, issuer.token_of()).status_code == 200
    answer = send(client, issuer.token_of(sub="system:serviceaccount:default:a-source2"))
    assert (answer.status_code, error_of(answer)["type"]) == (403, "forbidden")
    assert error_of(answer)["message"] == ("system:serviceaccount:default:a-source2 is not let in here (FUNCTION_OIDC_SUBJECTS)")
    assert "WWW-Authenticate" not in answer.headers
    assert send(client, issuer.token_of(sub="\ud800 ü")).status_code == 403
    refused(send(client, issuer.token_of(OTHER, sub="another")))


def test_with_keys_the_functions_own_url_needs_a_key_or_a_token_and_all_else_a_key(
    make_client: MakeClient, issuer: Issuer, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a-key\n")
    client = make_client(api_keys_file=keys)
    assert send(client, "a-key").status_code == 200
    assert issuer.asked == []
    assert send(client, issuer.token_of()).status_code == 200
    refused(send(client, "another-key"))
    refused(send(client, None))
    for token, status in (("a-key", 200), (issuer.token_of(), 401)):
        headers = {"Authorization": f"Bearer {token}"}
        assert client.post("/", json=1, headers=headers).status_code == 200
        assert client.post("/v1/models/echo:predict", json={"instances": [1]}, headers=headers).status_code == status
    assert client.get("/readyz").status_code == 200
    keys.unlink()
    assert send(client, issuer.token_of()).status_code == 200  # which needs no key
    assert send(client, "a-key").status_code == 503
    refused(send(client, None))


def test_the_same_subject_is_the_same_caller_whatever_its_token(issuer: Issuer, tmp_path: Path) -> None:
    senders, gate = senders_of(issuer, tmp_path), Gate(FunctionSettings(agent="a:B", oidc_audience=AUDIENCE, oidc_issuer=issuer.url))
    tokens = [issuer.token_of(), issuer.token_of(EC, "second", "ES256"), issuer.token_of(exp=time.time() + 99)]
    assert {senders.check(f"Bearer {token}") for token in tokens} == {f"subject:{issuer.name} {SENDER}"}
    assert gate.check("/", f"Bearer {tokens[0]}", method="POST") == f"subject:{issuer.name} {SENDER}"
    assert senders.check("Bearer " + issuer.token_of(sub="another")) == f"subject:{issuer.name} another"
    assert gate.check("/v1/models", "Bearer junk", method="GET") == ""


# Junk


@pytest.mark.parametrize(
    "header",
    [
        {"alg": "RS256"},
        {"alg": "RS256", "kid": ""},
        {"alg": "RS256", "kid": 7},
        {"alg": "RS256", "kid": ["first"]},
        {"alg": "RS256", "kid": "\ud800"},
        {"alg": "RS256", "kid": "first", "crit": ["\ud800"]},
        {"alg": "RS256", "kid": "first", "b64": False, "crit": ["b64"]},
        {"alg": {}, "kid": "first"},
        [],
        None,
    ],
)
def test_headers_of_kinds_that_none_should_be_are_refused(client: FlaskClient, header: Any) -> None:
    refused(send(client, signed_by_hand(header, {}, lambda data: b"x")))


@hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=60))
@example("Bearer")
@example("Bearer  ")
@example("Bearer a.b.c")
@example("Bearer ..")
@example("Basic YTpi")
@example("Bearer é.é.é")
@example("Bearer " + "[" * 7000)
@example("Bearer " + base64.urlsafe_b64encode(b"[" * 6000).decode() + ".e30.e30")
def test_junk_is_refused(client: FlaskClient, authorization: str) -> None:
    for value in (authorization, f"Bearer {authorization}"):
        refused(client.post("/", data=b"1", headers={**EVENT, "Authorization": value.encode("latin-1").decode("latin-1")}))


# The issuer's keys


def test_a_key_that_the_issuer_has_since_is_fetched_and_a_junk_key_is_not_fetched_for_again_and_again(
    client: FlaskClient, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert send(client, issuer.token_of()).status_code == 200
    issuer.keys = [rsa_key(OTHER, "third")]
    assert send(client, issuer.token_of(OTHER, "third")).status_code == 200
    assert issuer.asked == PATHS * 2
    answer = send(client, issuer.token_of(OTHER, "junk"))
    assert (answer.status_code, issuer.asked) == (503, PATHS * 2)
    assert 1 <= int(answer.headers["Retry-After"]) <= oidc.AGAIN_S
    assert send(client, issuer.token_of(OTHER, "third")).status_code == 200
    monkeypatch.setattr(oidc, "AGAIN_S", 0.0)
    assert refused(send(client, issuer.token_of(OTHER, "junk"))) == "the token is not accepted: its issuer has no key of that id (kid)"
    assert issuer.asked == PATHS * 3


def test_a_key_that_the_issuer_has_no_more_is_refused(client: FlaskClient, issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert send(client, issuer.token_of()).status_code == 200
    issuer.keys = [rsa_key(OTHER, "third")]
    assert send(client, issuer.token_of()).status_code == 200  # for as long as the keys count as fresh
    monkeypatch.setattr(oidc, "FRESH_S", 0.0)
    assert refused(send(client, issuer.token_of())) == "the token is not accepted: its issuer has no key of that id (kid)"


def test_an_issuer_that_is_away_means_later_and_never_unchecked(make_client: MakeClient, issuer: Issuer) -> None:
    client = make_client(oidc_issuer=f"http://127.0.0.1:{free_port()}")
    for token in (issuer.token_of(), issuer.token_of(OTHER)):
        answer = send(client, token)
        assert (answer.status_code, error_of(answer)["type"]) == (503, "unavailable")
        assert 1 <= int(answer.headers["Retry-After"]) <= oidc.AGAIN_S
    refused(send(client, "junk"))
    assert client.get("/readyz").status_code == 200


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"status": 500}, id="fails"),
        pytest.param({"status": 302, "headers": {"Location": PATHS[0]}}, id="sends elsewhere"),
        pytest.param({"body": b"<html>"}, id="answers with something else"),
        pytest.param({"body": b"[]"}, id="answers with a list"),
        pytest.param({"body": b"{}"}, id="answers with nothing"),
        pytest.param({"body": b'{"issuer": 1, "jwks_uri": 2}'}, id="answers with numbers"),
        pytest.param({"body": b'{"padding": "' + b"x" * (1 << 20) + b'"}'}, id="answers with too much"),
        pytest.param({"body": b'{"issuer": "http', "headers": {"Content-Length": "99", "Connection": "close"}}, id="breaks off"),
        pytest.param({"keys": []}, id="has no keys"),
        pytest.param({"keys": None}, id="has no list of keys"),
        pytest.param({"name": "https://elsewhere.example"}, id="is another"),
    ],
)
def test_an_issuer_that_does_not_make_sense_means_later(client: FlaskClient, issuer: Issuer, change: dict[str, Any]) -> None:
    token = issuer.token_of()
    before = {name: getattr(issuer, name) for name in change}
    for name, value in change.items():
        setattr(issuer, name, value)
    answer = send(client, token)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    assert error_of(answer)["message"] == "the keys of the token's issuer cannot be fetched; the function's log says why"
    asked = len(issuer.asked)
    for name, value in before.items():
        setattr(issuer, name, value)
    assert send(client, token).status_code == 503  # not asked again so soon
    assert len(issuer.asked) == asked


def test_keys_elsewhere_are_fetched_in_a_safe_way_only(client: FlaskClient, issuer: Issuer, caplog: pytest.LogCaptureFixture) -> None:
    issuer.body = json.dumps({"issuer": issuer.name, "jwks_uri": "http://keys.example/jwks"}).encode()
    assert send(client, issuer.token_of()).status_code == 503
    assert "must be https; http is only for a host on loopback" in caplog.text


def test_the_issuer_may_be_away_for_a_while_once_its_keys_are_known(
    client: FlaskClient, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert send(client, issuer.token_of()).status_code == 200
    issuer.status = 503
    monkeypatch.setattr(oidc, "FRESH_S", 0.0)
    assert [send(client, issuer.token_of()).status_code for _ in range(3)] == [200] * 3
    assert issuer.asked == [*PATHS, PATHS[0]]
    refused(send(client, issuer.token_of(exp=1)))
    monkeypatch.setattr(oidc, "KEPT_S", 0.0)
    assert send(client, issuer.token_of()).status_code == 503


def test_an_issuer_that_hangs_holds_nobody_for_long(client: FlaskClient, issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oidc, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(oidc, "AGAIN_S", 3600.0)
    issuer.may_answer.clear()
    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda _: send(client, issuer.token_of()).status_code, range(24)))
    assert statuses == [503] * 24
    assert issuer.asked == PATHS[:1]  # the others did not even ask
    assert issuer.waiting == 1  # whoever asked has not waited for as long as it hangs


def test_those_who_come_together_share_one_fetch(client: FlaskClient, issuer: Issuer) -> None:
    issuer.may_answer.clear()
    with ThreadPoolExecutor(8) as pool:
        pending = [pool.submit(send, client, issuer.token_of()) for _ in range(8)]
        wait_until("the fetch", lambda: issuer.asked)
        issuer.may_answer.set()
        assert [found.result().status_code for found in pending] == [200] * 8
    assert issuer.asked == PATHS


def test_nobody_waits_while_known_keys_are_fetched_again(client: FlaskClient, issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert send(client, issuer.token_of()).status_code == 200
    monkeypatch.setattr(oidc, "FRESH_S", 0.0)
    issuer.may_answer.clear()
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(send, client, issuer.token_of())
        wait_until("the fetch", lambda: len(issuer.asked) == 3)
        assert send(client, issuer.token_of()).status_code == 200
        assert not held.done()
        issuer.may_answer.set()
        assert held.result().status_code == 200


def test_keys_of_other_kinds_are_passed_over(client: FlaskClient, issuer: Issuer) -> None:
    small = rsa.generate_private_key(65537, 1024)  # noqa: S505  which is the point
    private = RSAAlgorithm.to_jwk(RSA, as_dict=True) | {"kid": "private"}
    issuer.keys = [
        7,
        {"kty": "new", "kid": "new"},
        {"kty": "oct", "kid": "first", "k": "c2VjcmV0"},
        {"kty": "RSA", "kid": "broken", "n": 1, "e": "AQAB"},
        {"kty": "EC", "crv": "P-256", "kid": "broken", "x": "AA", "y": "AA"},
        rsa_key(RSA, "encryption", use="enc"),
        rsa_key(RSA, "pss", alg="PS256"),
        rsa_key(small, "small"),
        {"kty": "RSA", "n": "AQAB", "e": "AQAB"},
        private,
        rsa_key(RSA, "first"),
    ]
    assert send(client, issuer.token_of()).status_code == 200
    assert send(client, issuer.token_of(RSA, "private")).status_code == 200
    with pytest.warns(jwt.warnings.InsecureKeyLengthWarning):
        weak = issuer.token_of(small, "small")
    assert "below the minimum" in refused(send(client, weak))
    senders = Senders(FunctionSettings(agent="a:B", oidc_audience=AUDIENCE, oidc_issuer=issuer.url))
    for key_id in ("encryption", "pss", "broken", "new"):
        with pytest.raises((Unauthorized, Unavailable)):
            senders.check("Bearer " + issuer.token_of(RSA, key_id))


# The cluster


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a pod's, with a certificate for 127.0.0.1, its key, and as `ca.crt` the certificate that signed it."""
    folder = tmp_path_factory.mktemp("pod")
    now = datetime.now(UTC)
    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("ca", "server")}
    names = {name: x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]) for name in keys}
    for name, key in keys.items():
        builder = x509.CertificateBuilder(names["ca"], names[name], key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(hours=1))
        if name == "ca":
            builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        else:
            address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
            builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
        signed = builder.sign(keys["ca"], hashes.SHA256())
        (folder / f"{name}.crt").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    private = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "server.key").write_bytes(keys["server"].private_bytes(*private))
    return folder


@pytest.fixture
def cluster(authority: Path) -> Iterator[Issuer]:
    """An issuer that speaks TLS, and only to those who have its pods' token."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority / "server.crt", authority / "server.key")
    found = Issuer(context)
    found.token = "Bearer pods-own"
    yield found
    found.stop()


def senders_of(issuer: Issuer, pod: Path) -> Senders:
    return Senders(FunctionSettings(agent="a:B", oidc_audience=AUDIENCE, oidc_issuer=issuer.url), pod)


def test_a_cluster_is_asked_with_the_pods_own_token_and_certificate(cluster: Issuer, authority: Path) -> None:
    (authority / "token").write_text("pods-own\n")
    senders_of(cluster, authority).check("bearer " + cluster.token_of())
    assert cluster.authorizations == ["Bearer pods-own"] * 2


def test_who_has_no_certificate_of_the_cluster_never_sees_the_pods_token(
    cluster: Issuer, authority: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.token = None
    (tmp_path / "token").write_text("pods-own")
    with pytest.raises(Unavailable):  # nobody vouches for it
        senders_of(cluster, tmp_path).check("Bearer " + cluster.token_of())
    assert cluster.asked == []
    monkeypatch.setenv("SSL_CERT_FILE", str(authority / "ca.crt"))  # the system does
    senders_of(cluster, tmp_path).check("Bearer " + cluster.token_of())
    assert cluster.authorizations == [None, None]


def test_an_issuer_on_loopback_without_tls_never_sees_the_pods_token(issuer: Issuer, authority: Path) -> None:
    (authority / "token").write_text("pods-own\n")
    senders_of(issuer, authority).check("Bearer " + issuer.token_of())
    assert issuer.authorizations == [None, None]


def test_the_cluster_may_call_itself_as_it_likes(issuer: Issuer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    issuer.name = "https://kubernetes.default.svc.cluster.local"
    monkeypatch.setattr(oidc, "CLUSTER_ISSUER", issuer.url)
    senders = senders_of(issuer, tmp_path)
    senders.check("Bearer " + issuer.token_of())
    with pytest.raises(Unauthorized, match="Invalid issuer"):
        senders.check("Bearer " + issuer.token_of(iss=issuer.url))


# Settings, and the function as it is deployed


@pytest.mark.parametrize(
    "url",
    [
        "http://kubernetes.default.svc",
        "kubernetes.default.svc",
        "ftp://127.0.0.1",
        "http://127.0.0.1.example",
        "https://",
        "https://a.example?x=1",
        "https://u:p@a.example",
        "https://a.example:0",
        "https://a.example:x",
        "https://[::1",
    ],
)
def test_an_issuer_that_cannot_be_asked_safely_is_a_wrong_setting(url: str) -> None:
    with pytest.raises(SettingsError) as error:
        Senders(FunctionSettings(agent="a:B", oidc_audience=AUDIENCE, oidc_issuer=url))
    assert str(error.value).startswith(f"FUNCTION_OIDC_ISSUER={url.replace('u:p@', '***@')!r}: ")


@pytest.mark.parametrize("url", ["https://a.example", "https://a.example:8443/realms/x/", "http://localhost:1", "http://[::1]:1"])
def test_an_issuer_that_can_be_asked_safely_is_fine(url: str) -> None:
    Senders(FunctionSettings(agent="a:B", oidc_audience=AUDIENCE, oidc_issuer=url))


def environment(port: int, **settings: str) -> dict[str, str]:
    return clean_environment(
        PORT=str(port), FUNCTION_HOST="127.0.0.1", FUNCTION_AGENT="function.agents.echo:Echo", FUNCTION_OIDC_AUDIENCE=AUDIENCE, **settings
    )


def test_the_function_as_it_is_deployed_asks_for_tokens(issuer: Issuer, tmp_path: Path) -> None:
    port = free_port()
    with running(
        [str(BIN / "python"), "-m", "function"], tmp_path / "log", environment(port, FUNCTION_OIDC_ISSUER=issuer.url), port
    ) as server:
        server.ready()
        for token, status in ((issuer.token_of(), 200), (issuer.token_of(OTHER), 401), ("junk", 401)):
            assert request(port, "POST", "/", b"1", {**EVENT, "Authorization": f"Bearer {token}"}).status == status
        assert request(port, "POST", "/", b"1", EVENT).headers["www-authenticate"] == "Bearer"
        assert [request(port, "POST", "/", 1, headers).status for headers in ({}, {"Authorization": "Bearer junk"})] == [401, 401]
        assert request(port, "POST", "/", 1, {"Authorization": f"Bearer {issuer.token_of()}"}).json() == 1
        assert request(port, "POST", "/v1/models/model:predict", {"instances": [1]}).status == 200
        assert "Traceback" not in server.said()


def test_probes_are_answered_while_the_issuer_is_waited_for(issuer: Issuer, tmp_path: Path) -> None:
    port, code = free_port(), "from function import oidc, server; oidc.TIMEOUT_S = 60.0; server.main()"
    with running([str(BIN / "python"), "-c", code], tmp_path / "log", environment(port, FUNCTION_OIDC_ISSUER=issuer.url), port) as server:
        server.ready()
        issuer.may_answer.clear()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(request, port, "POST", "/", 1, {"Authorization": f"Bearer {issuer.token_of()}"})
            wait_until("the issuer is asked", lambda: issuer.asked)
            assert request(port, "GET", "/healthz").status == 200
            assert not waiting.done()
            issuer.may_answer.set()
            assert waiting.result().status == 200


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"PYTHONPATH": "without"}, "FUNCTION_OIDC_AUDIENCE is set, but PyJWT is not installed: pip install 'relight[oidc]'"),
        (
            {"FUNCTION_OIDC_ISSUER": "http://a.example"},
            "FUNCTION_OIDC_ISSUER='http://a.example': must be https; http is only for a host on loopback",
        ),
    ],
)
def test_what_is_missing_or_wrong_stops_the_start_with_one_line(settings: dict[str, str], said: str, tmp_path: Path) -> None:
    if "PYTHONPATH" in settings:
        (tmp_path / "jwt.py").write_text("raise ImportError('it is not here')\n")
        settings = {"PYTHONPATH": str(tmp_path)}
    with running([str(BIN / "python"), "-m", "function"], tmp_path / "log", environment(free_port(), **settings)) as server:
        assert server.wait() == 2
        assert server.said() == f"function: {said}\n"


def test_nothing_of_it_is_imported_where_it_is_off(tmp_path: Path) -> None:
    code = (
        "import sys, function.server\n"
        "from function.app import create_app\n"
        "assert not {'jwt', 'cryptography', 'function.oidc'} & set(sys.modules)\n"
    )
    with running([str(BIN / "python"), "-c", code], tmp_path / "log", clean_environment()) as server:
        assert server.wait() == 0, server.said()
