"""The least HTTP/1.1 client that can time an event stream: one connection a request, asyncio
streams, no dependency.

A full client library costs 50 to 200 us for each chunk, which at a few thousand tokens a second is
what one would measure.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import SplitResult, urlsplit

import msgspec

LIMIT = 16 * 1024 * 1024  # longest line


class HttpError(Exception):
    """The server answered with something else than 200."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"HTTP {status}: {body[:500]}")
        self.status = status


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where requests go, and the headers that all of them carry."""

    url: SplitResult
    headers: Mapping[str, str]

    @classmethod
    def parse(cls, url: str, headers: Mapping[str, str] | None = None) -> Self:
        return cls(urlsplit(url), headers or {})

    async def get_json(self, path: str) -> Any:
        return msgspec.json.decode(await self._whole("GET", path, b""))

    async def post_json(self, path: str, body: Any) -> Any:
        return msgspec.json.decode(await self._whole("POST", path, msgspec.json.encode(body)))

    async def stream(self, path: str, body: Any) -> AsyncIterator[bytes]:
        """The data of each event, without [DONE]."""
        reader, writer = await self._send("POST", path, msgspec.json.encode(body))
        try:
            pending = b""
            async for piece in _body(reader, await _head(reader)):
                *events, pending = (pending + piece).split(b"\n\n")
                for event in events:
                    data = event.removeprefix(b"data: ")
                    if event.startswith(b"data: ") and data != b"[DONE]":
                        yield data
        finally:
            writer.close()

    async def _whole(self, method: str, path: str, body: bytes) -> bytes:
        reader, writer = await self._send(method, path, body)
        try:
            head = await _head(reader)
            return b"".join([piece async for piece in _body(reader, head)])
        finally:
            writer.close()

    async def _send(
        self, method: str, path: str, body: bytes
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        url = self.url
        is_tls = url.scheme == "https"
        port = url.port or (443 if is_tls else 80)
        context = ssl.create_default_context() if is_tls else None
        reader, writer = await asyncio.open_connection(url.hostname, port, ssl=context, limit=LIMIT)
        lines = [f"{method} {url.path.rstrip('/')}{path} HTTP/1.1", f"host: {url.netloc}"]
        lines += ["connection: close", f"content-length: {len(body)}"]
        lines += ["content-type: application/json"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        return reader, writer


async def _head(reader: asyncio.StreamReader) -> dict[str, str]:
    """Headers of a 200; anything else is raised with its body."""
    status_line = (await reader.readline()).split()
    if len(status_line) < 2:
        raise ConnectionError("the server closed the connection")
    headers: dict[str, str] = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip()
    status = int(status_line[1])
    if status != 200:
        body = b"".join([piece async for piece in _body(reader, headers)])
        raise HttpError(status, body.decode(errors="replace"))
    return headers


async def _body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
    if headers.get("transfer-encoding", "").lower() != "chunked":
        length = headers.get("content-length")
        yield await (reader.read() if length is None else reader.readexactly(int(length)))
        return
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)
