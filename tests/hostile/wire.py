"""HTTP as bytes on a socket: clients that no library lets anyone write."""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

DONE = b"data: [DONE]\n\n"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@dataclass(frozen=True)
class Answer:
    """`status` is 0 if the server closed the connection without a word."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    def json(self) -> Any:
        return json.loads(self.body)


def request_bytes(
    path: str, body: bytes, *, method: str = "POST", headers: dict[str, str] | None = None
) -> bytes:
    """A whole request. `headers` replace the usual ones; an empty value leaves one out."""
    usual = {
        "host": "localhost",
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
    }
    lines = [f"{method} {path} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in {**usual, **(headers or {})}.items() if value]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


async def ask(port: int, data: bytes, seconds: float = 60.0) -> Answer:
    """Send, and read until the server closes."""
    async with asyncio.timeout(seconds):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(data)
            raw = await _read_all(reader)
        except ConnectionError:
            raw = b""
        finally:
            writer.transport.abort()
    return parse(raw)


async def ask_json(port: int, path: str, body: dict[str, Any]) -> Answer:
    return await ask(port, request_bytes(path, json.dumps(body).encode()))


def parse(raw: bytes) -> Answer:
    """One response. Chunked bodies are joined."""
    head, _, body = raw.partition(b"\r\n\r\n")
    if not head:
        return Answer(0)
    lines = head.decode("latin-1").split("\r\n")
    headers = {
        name.lower(): value.strip()
        for name, _, value in (line.partition(":") for line in lines[1:])
    }
    if headers.get("transfer-encoding") == "chunked":
        body = _unchunk(body)
    return Answer(int(lines[0].split()[1]), headers, body)


def tokens_of(answer: Answer) -> list[int]:
    """Token ids of a completion that was asked for with `return_token_ids`, streamed or not."""
    if "text/event-stream" not in answer.headers["content-type"]:
        return answer.json()["choices"][0]["token_ids"]
    chunks = answer.body.removesuffix(DONE).split(b"\n\n")
    events = [json.loads(chunk[6:]) for chunk in chunks if chunk.startswith(b"data: ")]
    return [i for event in events for c in event["choices"] for i in c["token_ids"]]


async def _read_all(reader: asyncio.StreamReader) -> bytes:
    parts: list[bytes] = []
    try:
        while part := await reader.read(1 << 16):
            parts.append(part)
    except ConnectionError:
        pass  # what came before a reset counts
    return b"".join(parts)


def _unchunk(body: bytes) -> bytes:
    result = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        if (length := int(size or b"0", 16)) == 0:
            break
        result, body = result + body[:length], body[length + 2 :]
    return result
