"""What no HTTP library sends: broken framing, halves of requests, clients that dawdle."""

import asyncio
import contextlib
import json

from tests.e2e.live import LiveServer
from tests.hostile.wire import COMPLETIONS, Answer, parse, request_bytes

BODY = json.dumps({"prompt": "ab", "max_tokens": 2}).encode()
GOOD = request_bytes(COMPLETIONS, BODY)
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
JSON_HEAD = HEAD + b"connection: close\r\n"
CHUNKED = JSON_HEAD + b"transfer-encoding: chunked\r\n\r\n"
CLOSED = 0  # without a word

# name, bytes, statuses that are right; the client then closes its half
BROKEN: list[tuple[str, bytes, set[int]]] = [
    ("nothing", b"", {CLOSED}),
    ("NULs", b"\0" * 100, {400}),
    ("noise", bytes(range(256)), {400}),
    ("a TLS hello", bytes.fromhex("16030100c8010000c40303") + b"\x11" * 60, {400}),
    ("an HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400}),
    ("HTTP/0.9", b"GET /health\r\n\r\n", {200, 400}),
    ("HTTP/9.9", b"GET /health HTTP/9.9\r\n\r\n", {400}),
    ("a negative length", JSON_HEAD + b"content-length: -1\r\n\r\n" + BODY, {400}),
    ("a length in words", JSON_HEAD + b"content-length: many\r\n\r\n" + BODY, {400}),
    ("a length of 5000 digits", JSON_HEAD + b"content-length: " + b"9" * 5000 + b"\r\n\r\n", {400}),
    (
        "a length beyond the limit",
        JSON_HEAD + b"content-length: 99999999999\r\n\r\n",
        {413, CLOSED},
    ),
    ("two lengths", JSON_HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\n12345", {400}),
    (
        "length and chunks",
        JSON_HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        {400},
    ),
    ("a bad chunk", CHUNKED + b"zz\r\n{}\r\n0\r\n\r\n", {400, CLOSED}),
    ("a huge chunk", CHUNKED + b"f" * 40 + b"\r\n{}\r\n", {400, CLOSED}),
    ("a cut chunk", CHUNKED + b"ff\r\n{}", {400, CLOSED}),
    ("a space before the colon", HEAD + b"x : y\r\n\r\n", {400}),
    ("a NUL in a header", HEAD + b"x: a\0b\r\n\r\n", {400}),
    ("a path that is no ASCII", b"GET /\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n", {400, 404}),
    ("a URL that is none", b"GET http://[::1 HTTP/1.1\r\nhost: x\r\n\r\n", {400}),
    ("a head of 300 kB", HEAD + b"x: " + b"a" * 300_000, {431, CLOSED}),
    ("a head of many lines", HEAD + b"x: a\r\n" * 60_000, {431, CLOSED}),
    ("half a head", HEAD[:20], {CLOSED}),
    ("half a body", GOOD[:-5], {CLOSED}),
    (
        "a websocket",
        b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\n"
        b"upgrade: websocket\r\nsec-websocket-key: x\r\nsec-websocket-version: 13\r\n\r\n",
        {200, 400, CLOSED},
    ),
    ("two in one", GOOD.replace(b"connection: close\r\n", b"") + GOOD, {200, CLOSED}),
]


async def run_broken(server: LiveServer) -> list[str]:
    """What was wrong, one line for each."""
    faults: list[str] = []
    for name, data, statuses in BROKEN:
        answer = await half_closed(server, data)
        if answer.status not in statuses:
            faults.append(f"{name}: status {answer.status}: {answer.body[:200]!r}")
        elif answer.status >= 400 and not answer.json()["error"]["message"]:
            faults.append(f"{name}: no reason given")
    return faults


async def half_closed(server: LiveServer, data: bytes) -> Answer:
    """Send, close our half, read what comes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.http_port)
    raw = b""
    with contextlib.suppress(ConnectionError):
        writer.write(data)
        await writer.drain()
        await asyncio.sleep(0.02)  # the answer is on its way before the end of ours arrives
        if writer.can_write_eof():
            writer.write_eof()
        async with asyncio.timeout(20):
            raw = await reader.read(-1)
    writer.transport.abort()
    return parse(raw)


async def dawdle(server: LiveServer, data: bytes, gap: float) -> tuple[Answer, float]:
    """Send a byte every `gap` seconds until the server has enough. (its answer, seconds)."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.http_port)
    answer = asyncio.ensure_future(reader.read(-1))
    raw = b""
    with contextlib.suppress(ConnectionError):
        for position in range(len(data)):
            if answer.done():
                break
            writer.write(data[position : position + 1])
            await asyncio.wait((answer,), timeout=gap)
        raw = await answer
    writer.transport.abort()
    return parse(raw), loop.time() - started
