"""Hostile requests: the same ones in the same order each time.

An `HttpCase` is a body for a path, a `GrpcCase` bytes for a method. What a server may answer is
bounded by `verdict`; a case that knows more says so in `statuses` or `codes`, and `param`.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import grpc

from tests.hostile.wire import DONE, Answer

SEED = 20_260_701
# Refusals that name their reason. No 5xx but 503, while draining, which nobody does here.
STATUSES = frozenset({200, 400, 404, 405, 408, 409, 413, 415, 429, 431})
CODES = frozenset(
    {
        grpc.StatusCode.OK,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
    }
)
MAX_ANSWER_BYTES = 8 << 20
MAX_MESSAGE_CHARS = 2100  # of a refusal: it quotes no megabytes


@dataclass(frozen=True)
class HttpCase:
    name: str
    path: str
    body: bytes
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=dict)
    statuses: frozenset[int] = STATUSES
    param: str = ""  # what the error must name; "": anything

    def verdict(self, answer: Answer) -> str:
        """What is wrong with the answer; empty if nothing is."""
        if answer.status not in self.statuses:
            return f"status {answer.status}: {answer.body[:300]!r}"
        if answer.status == 200:
            return self._of_success(answer)
        return self._of_error(answer)

    def _of_success(self, answer: Answer) -> str:
        kind = answer.headers.get("content-type", "")
        if len(answer.body) > MAX_ANSWER_BYTES:
            return f"an answer of {len(answer.body)} bytes"
        if "event-stream" in kind:
            return "" if answer.body.endswith(DONE) else "a stream without its end"
        if "json" in kind:
            answer.json()
        return ""

    def _of_error(self, answer: Answer) -> str:
        try:
            error = answer.json()["error"]
            message, param = error["message"], error["param"]
        except (ValueError, KeyError, TypeError):
            return f"not OpenAI's form: {answer.body[:300]!r}"
        if not message or len(message) > MAX_MESSAGE_CHARS or error["code"] != answer.status:
            return f"message of {len(message)} characters, code {error['code']}"
        if answer.status == 429 and "retry-after" not in answer.headers:
            return "429 without Retry-After"
        if answer.status == 400 and not param:
            return f"names no field: {message!r}"
        if self.param and param.partition("[")[0].partition(".")[0] != self.param:
            return f"names {param!r}, not {self.param!r}: {message[:200]!r}"
        return ""


@dataclass(frozen=True)
class GrpcCase:
    name: str
    method: str  # /package.Service/Method
    payload: bytes
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    timeout: float | None = 60.0
    cancel_after: int | None = None  # messages
    codes: frozenset[grpc.StatusCode] = CODES
    streams: bool = True
    field_name: str = ""  # that the message must begin with
    has_message: bool = True  # False: the transport refuses, and gives none

    def verdict(self, code: grpc.StatusCode, details: str) -> str:
        if code not in self.codes:
            return f"{code.name}: {details[:300]!r}"
        if code is grpc.StatusCode.OK:
            return ""
        if (self.has_message and not details) or len(details) > MAX_MESSAGE_CHARS:
            return f"{code.name} with a message of {len(details)} characters"
        if self.field_name and not details.startswith(self.field_name):
            return f"does not name {self.field_name}: {details[:200]!r}"
        return ""


def mutations(valid: bytes, count: int, rng: random.Random) -> Iterator[bytes]:
    """Bytes that were right before something happened to them."""
    for _ in range(count):
        data = bytearray(valid)
        for _ in range(rng.randrange(1, 5)):
            at = rng.randrange(len(data) + 1)
            match rng.randrange(5):
                case 0:
                    data[at:at] = rng.randbytes(rng.randrange(1, 5))
                case 1:
                    del data[at : at + rng.randrange(1, 9)]
                case 2:
                    data[at:at] = data[at : at + rng.randrange(1, 20)]
                case 3:
                    del data[at:]
                case _:
                    if at < len(data):
                        data[at] ^= 1 << rng.randrange(8)
            if not data:
                data = bytearray(valid)
        yield bytes(data)
