"""The whole path in one minute: fetch a model, serve it, ask it over gRPC and over HTTP, stop it.

python examples/demo.py [MODEL]
"""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from jengine.client import Client
from jengine.loading.pull import PULLABLE, pull

MODEL = "smollm2-135m"
START_SECONDS = 300.0
STOP_SECONDS = 60.0
# Small, so that the first start compiles for seconds; `jengine serve` defaults to 64 requests a
# step.
SERVER_FLAGS = ["--max-num-seqs", "8", "--max-num-batched-tokens", "256", "--max-model-len", "2048"]
GRPC_QUESTION = "What is the capital of France, and what is it known for?"
HTTP_QUESTION = "Give me three tips for a good night's sleep."
MAX_TOKENS = 80

console = Console(highlight=False)


@dataclass(frozen=True)
class Measured:
    """One streamed answer, timed by the client."""

    protocol: str
    num_tokens: int
    first_token_seconds: float
    total_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """After the first token."""
        return (self.num_tokens - 1) / (self.total_seconds - self.first_token_seconds)


def main() -> int:
    model = sys.argv[1] if len(sys.argv) > 1 else MODEL
    if model in PULLABLE:
        pull(model, lambda line: console.print(f"[dim]{line}[/]"))
    http_port, grpc_port = free_ports(2)
    with server(model, http_port, grpc_port) as process:
        with Client(f"127.0.0.1:{grpc_port}") as client:
            measured = [ask_grpc(client), ask_http(http_port, model)]
            plan = client.server_info().memory_plan
        show(measured, plan)
        process.send_signal(signal.SIGTERM)
        code = process.wait(STOP_SECONDS)
    console.print(f"the server has drained and stopped with exit code {code}")
    return code


def ask_grpc(client: Client) -> Measured:
    """Stream a chat answer over jengine.v1."""
    heading("gRPC", GRPC_QUESTION)
    started = time.perf_counter()
    first, num_tokens = 0.0, 0
    messages = [{"role": "user", "content": GRPC_QUESTION}]
    for delta in client.chat(messages, temperature=0.0, max_tokens=MAX_TOKENS):
        first = first or time.perf_counter() - started
        num_tokens += len(delta.token_ids)
        say(delta.text)
    say("\n")
    return Measured("gRPC  jengine.v1 Chat", num_tokens, first, time.perf_counter() - started)


def ask_http(port: int, model: str) -> Measured:
    """The same over the OpenAI API, with nothing but the standard library."""
    heading("HTTP", HTTP_QUESTION)
    body = {
        "model": model,
        "messages": [{"role": "user", "content": HTTP_QUESTION}],
        "temperature": 0.0,
        "max_tokens": MAX_TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started = time.perf_counter()
    first, num_tokens = 0.0, 0
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request(
        "POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"}
    )
    for line in connection.getresponse():
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line.removeprefix(b"data: "))
        if chunk.get("usage"):
            num_tokens = chunk["usage"]["completion_tokens"]
        for choice in chunk["choices"]:
            if text := choice["delta"].get("content"):
                first = first or time.perf_counter() - started
                say(text)
    say("\n")
    connection.close()
    return Measured("HTTP  /v1/chat/completions", num_tokens, first, time.perf_counter() - started)


def show(measured: list[Measured], plan: str) -> None:
    table = Table(title="\nMeasured by the client")
    for name in ("protocol", "tokens", "TTFT ms", "tokens/s"):
        table.add_column(name, justify="left" if name == "protocol" else "right")
    for row in measured:
        table.add_row(
            row.protocol,
            str(row.num_tokens),
            f"{row.first_token_seconds * 1000:.0f}",
            f"{row.tokens_per_second:.1f}",
        )
    console.print(table)
    console.print(f"\n[bold]Memory plan[/]\n{plan}")


@contextmanager
def server(model: str, http_port: int, grpc_port: int) -> Iterator[subprocess.Popen[str]]:
    """A server process, ready to serve; killed if it is still there in the end."""
    command = [sys.executable, "-m", "jengine.server", "serve", model, "--log-format", "console"]
    command += ["--port", str(http_port), "--grpc-port", str(grpc_port), *SERVER_FLAGS]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    last_lines: deque[str] = deque(maxlen=30)
    try:
        with console.status(f"starting {model}") as status:

            def follow() -> None:
                assert process.stderr is not None
                for line in process.stderr:
                    last_lines.append(line.rstrip())
                    status.update(f"starting {model}: {line.strip()[-100:]}")

            threading.Thread(target=follow, daemon=True).start()
            started = time.perf_counter()
            while not is_healthy(http_port):
                if process.poll() is not None or time.perf_counter() - started > START_SECONDS:
                    raise SystemExit("the server did not start:\n" + "\n".join(last_lines))
                time.sleep(0.1)
        console.print(f"[dim]ready after {time.perf_counter() - started:.1f} s[/]")
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def free_ports(count: int) -> list[int]:
    """Distinct ports that nothing listens on right now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


def heading(protocol: str, question: str) -> None:
    console.print(f"\n[bold cyan]{protocol}[/] [bold]{question}[/]")


def say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
