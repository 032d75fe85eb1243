"""TLS on both ports, Unix sockets, taken ports, and readers that are slow."""

import http.client
import json
import shutil
import socket
import ssl
import subprocess
import time
from pathlib import Path

import grpc
import pytest

from jengine.client import Client, collect
from jengine.server.__main__ import run_server
from jengine.server.settings import ServerSettings
from tests.server.harness import RunningServer, echo_server, wait_for


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Key and self-signed certificate of 127.0.0.1."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    return key, cert


def test_tls(echo_model: Path, certificate: tuple[Path, Path]) -> None:
    key, cert = certificate
    with echo_server(echo_model, ssl_keyfile=key, ssl_certfile=cert, wait_ready=False) as server:
        wait_for(lambda: server.app.state.status.value == "serving", 10.0)
        trusted = ssl.create_default_context(cafile=str(cert))
        connection = http.client.HTTPSConnection(
            "127.0.0.1", server.app.http_port or 0, context=trusted
        )
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
        connection.close()
        channel = grpc.ssl_channel_credentials(cert.read_bytes())
        with Client(server.grpc, credentials=channel) as client:
            assert collect(client.generate("ab", temperature=0, max_tokens=2))[0].text == "ab"


def test_tls_with_client_certificates(echo_model: Path, certificate: tuple[Path, Path]) -> None:
    key, cert = certificate
    with echo_server(
        echo_model, ssl_keyfile=key, ssl_certfile=cert, ssl_ca_certs=cert, wait_ready=False
    ) as server:
        wait_for(lambda: server.app.state.status.value == "serving", 10.0)
        anonymous = grpc.ssl_channel_credentials(cert.read_bytes())
        with (
            Client(server.grpc, credentials=anonymous) as client,
            pytest.raises(Exception, match="UNAVAILABLE"),
        ):
            client.server_info()
        known = grpc.ssl_channel_credentials(cert.read_bytes(), key.read_bytes(), cert.read_bytes())
        with Client(server.grpc, credentials=known) as client:
            assert client.server_info().vocab_size == 258


def test_http_on_a_unix_socket(echo_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "http.sock"
    with echo_server(echo_model, uds=str(path), wait_ready=False) as server:
        wait_for(lambda: server.app.state.status.value == "serving", 10.0)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            sock.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            assert sock.recv(100).startswith(b"HTTP/1.1 200")
    assert not path.exists()


@pytest.mark.parametrize("which", ["port", "grpc_port"])
def test_a_taken_port_is_an_error(
    server: RunningServer, which: str, caplog: pytest.LogCaptureFixture
) -> None:
    taken = server.app.http_port if which == "port" else server.app.grpc_port
    ports = {"port": 0, "grpc_port": 0, which: taken}
    settings = ServerSettings(**ports)  # type: ignore[arg-type]
    assert run_server(server.app.state.config, settings, in_process=True) == 1
    assert "could not start" in caplog.text


def test_a_slow_reader_loses_nothing_and_holds_nobody_up(server: RunningServer) -> None:
    body = {"prompt": "ab", "max_tokens": 250, "stream": True}
    slow = http.client.HTTPConnection("127.0.0.1", server.app.http_port or 0)
    slow.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    response = slow.getresponse()
    first = response.readline()
    with Client(server.grpc) as client:
        started = time.monotonic()
        collect(client.generate("ab", temperature=0, max_tokens=20))
        assert time.monotonic() - started < 1.0
    time.sleep(0.3)
    lines = [first, *response]
    texts = [
        json.loads(line[6:])["choices"][0]["text"] for line in lines if line.startswith(b"data: {")
    ]
    assert "".join(texts) == "ab" * 125
    slow.close()
