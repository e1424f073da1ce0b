"""Weights over https, from a store whose certificate an authority of its own has signed."""

import contextlib
import datetime
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.weights_cache.conftest import content, noise, push
from tests.weights_cache.stores import Bucket, Proxy
from weights_cache.cache import NodeCache
from weights_cache.connection import Connection
from weights_cache.errors import StoreUnavailable
from weights_cache.fetch import Puller
from weights_cache.store import Store
from weights_cache.uri import WeightsUri

MIB = 1 << 20
MODEL = {"config.json": b"{}", "model.safetensors": noise(5 * MIB + 777)}


class Front:
    """Takes TLS connections and passes on what is in them."""

    def __init__(self, certificate: Path, upstream: tuple[str, int]) -> None:
        self.connections = 0  # whose client was content with the certificate
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(certificate)
        self._upstream = upstream
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                peer, _ = self._listener.accept()
                threading.Thread(target=self._pass_on, args=(peer,), daemon=True).start()

    def _pass_on(self, peer: socket.socket) -> None:
        with contextlib.suppress(OSError), self._tls.wrap_socket(peer, server_side=True) as client:
            self.connections += 1
            with socket.create_connection(self._upstream) as up:
                threading.Thread(target=self._pump, args=(client, up), daemon=True).start()
                self._pump(up, client)

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(1 << 16):
                target.sendall(piece)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of an authority, and of 127.0.0.1 with its key."""
    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("ca", "server")}
    names = {name: x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]) for name in keys}
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    folder, found = tmp_path_factory.mktemp("certificates"), []
    for name, key in keys.items():
        builder = x509.CertificateBuilder(names["ca"], names[name], key.public_key(), x509.random_serial_number(), now - day, now + day)
        if name == "ca":
            builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        else:
            address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
            builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
        pem = builder.sign(keys["ca"], hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        if name == "server":
            pem += key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        found.append(folder / f"{name}.pem")
        found[-1].write_bytes(pem)
    return found[0], found[1]


@pytest.fixture
def front(bucket: Bucket, proxy: Proxy, certificates: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Front]:
    """What AWS_ENDPOINT_URL points at; AWS_CA_BUNDLE has its authority."""
    with contextlib.closing(Front(certificates[1], ("127.0.0.1", proxy.port))) as made:
        monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificates[0]))
        yield made


def test_weights_come_over_https_each_byte_once_and_over_connections_that_are_kept(
    bucket: Bucket, proxy: Proxy, front: Front, cache: NodeCache, puller: Callable[..., Puller]
) -> None:
    files = push(bucket, MODEL)
    before = front.connections
    assert content(cache, puller(bucket.uri, connections=2).run()) == files
    assert proxy.sent == sum(map(len, files.values()))
    assert before < front.connections <= before + 3  # boto3's own, and one for each worker


def test_what_is_cut_or_damaged_on_the_way_is_asked_for_again(
    bucket: Bucket, proxy: Proxy, front: Front, cache: NodeCache, puller: Callable[..., Puller], quick: None
) -> None:
    files = push(bucket, MODEL)
    proxy.is_spared = lambda key: not key.endswith("model.safetensors")
    proxy.faults.extend(["cut", "503", "flipped bit"])
    pull = puller(bucket.uri, connections=2)
    assert content(cache, pull.run()) == files
    assert not proxy.faults
    assert pull.progress.damaged == 1


def test_no_byte_is_read_from_a_store_whose_authority_is_not_trusted(
    bucket: Bucket, proxy: Proxy, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put(MODEL)
    monkeypatch.delenv("AWS_CA_BUNDLE")
    store = Store(WeightsUri.parse(bucket.uri))
    with pytest.raises(StoreUnavailable, match=rf"cannot list {bucket.uri} at {front.url}.*CERTIFICATE_VERIFY_FAILED"):
        store.list()
    with contextlib.closing(Connection(store)) as connection, pytest.raises(StoreUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
        connection.get(f"{front.url}/{bucket.name}/model/config.json", {})
    assert proxy.asked == []
