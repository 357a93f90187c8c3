"""The server as a process of its own: it drains, is killed and started again, speaks HTTPS."""

import datetime as dt
import http.client
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest

from conftest import PROMPT, wait_for

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def saved(model, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "little"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def start(saved):
    """Starts servers; returns each with its address."""
    running = []

    def begin(*options):
        command = [sys.executable, "-m", "ds_serve", "serve", str(saved), "--port", "0", "--json"]
        process = subprocess.Popen(  # noqa: S603 - ours
            [*command, *map(str, options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        )
        running.append(process)
        line = process.stdout.readline()
        assert line, process.stderr.read()[-2000:]
        return process, json.loads(line)["url"].removesuffix("/v1")

    yield begin
    for process in running:
        process.kill()
        process.wait(30)
        process.stdout.close()
        process.stderr.close()


def ask(url, body, context=None):
    data = json.dumps({"model": "little", "prompt": PROMPT, "temperature": 0} | body).encode()
    request = urllib.request.Request(f"{url}/v1/completions", data, JSON)  # noqa: S310 - our own
    with urllib.request.urlopen(request, timeout=60, context=context) as response:  # noqa: S310
        return json.load(response)


def test_sigterm_lets_answers_end_and_a_killed_server_starts_again(start):
    process, url = start()
    before = ask(url, {"max_tokens": 20})["choices"][0]["text"]
    answers = []
    stream = http.client.HTTPConnection(url.split("/")[2], timeout=60)
    body = {"model": "little", "prompt": PROMPT, "max_tokens": 100, "stream": True}
    stream.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    response = stream.getresponse()
    assert response.readline().startswith(b"data: ")
    process.send_signal(signal.SIGTERM)
    reader = threading.Thread(target=lambda: answers.append(response.read()))
    reader.start()
    reader.join(60)
    assert answers[0].endswith(b"data: [DONE]\n\n")
    assert process.wait(60) == -signal.SIGTERM  # uvicorn passes it on when all is done
    again, url = start()
    again.kill()
    again.wait(30)
    _, url = start()
    assert ask(url, {"max_tokens": 20})["choices"][0]["text"] == before


def certificate(folder: Path) -> tuple[Path, Path]:
    """Make a certificate for this machine that lasts an hour."""
    x509 = pytest.importorskip("cryptography.x509", reason="cryptography is not installed")
    from cryptography.hazmat.primitives import hashes, serialization  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    cert, private = folder / "cert.pem", folder / "key.pem"
    cert.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return cert, private


def test_https_and_keys(start, tmp_path):
    cert, private = certificate(tmp_path)
    keys = tmp_path / "keys.toml"
    keys.write_text('[keys.ann]\nkey = "ann-has-a-key"\n')
    _, url = start("--tls-cert", cert, "--tls-key", private, "--api-keys", keys)
    assert url.startswith("https://")
    trusted = ssl.create_default_context(cafile=str(cert))
    local = url.replace("127.0.0.1", "localhost")
    with pytest.raises(urllib.error.HTTPError) as error:
        ask(local, {"max_tokens": 2}, trusted)
    assert error.value.code == 401
    error.value.close()
    request = urllib.request.Request(  # noqa: S310 - our own
        f"{local}/v1/models", headers={"Authorization": "Bearer ann-has-a-key"}
    )
    with urllib.request.urlopen(request, context=trusted) as response:  # noqa: S310
        assert json.load(response)["data"][0]["id"] == "little"


def test_a_slow_reader_keeps_nobody_waiting(start):
    """A client that reads nothing fills its own buffers; the others are answered meanwhile."""
    process, url = start("--max-running", 4)
    slow = http.client.HTTPConnection(url.split("/")[2], timeout=60)
    body = {"model": "little", "prompt": PROMPT, "max_tokens": 110, "stream": True, "n": 4}
    body |= {"logprobs": 20}
    slow.request("POST", "/v1/completions", json.dumps(body), JSON)
    for _ in range(5):
        assert ask(url, {"max_tokens": 5})["usage"]["completion_tokens"] == 5

    def idle():
        with urllib.request.urlopen(f"{url}/ready") as response:  # noqa: S310
            return json.load(response)["requests"] == 0

    wait_for(idle)
    assert slow.getresponse().read().endswith(b"data: [DONE]\n\n")
    slow.close()
    assert process.poll() is None
