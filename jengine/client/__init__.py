"""A thin typed client of the gRPC service jengine.v1.Inference, blocking (`Client`) and asyncio
(`AsyncClient`).

    with Client("127.0.0.1:50051") as client:
        for delta in client.chat([{"role": "user", "content": "Hello!"}], temperature=0):
            print(delta.text, end="")

Keyword arguments of `generate` and `chat` are fields of `SamplingParams`; what is not given takes
the server's default. Leaving a stream early cancels it on the server. Statuses come back as the
errors of `jengine.errors`.
"""

from jengine.client.clients import AsyncClient, Client
from jengine.client.types import (
    CallOptions,
    Completion,
    Delta,
    Finish,
    Prompt,
    RpcFailedError,
    ServerInfo,
    TokenLogprob,
    collect,
)

__all__ = [
    "AsyncClient",
    "CallOptions",
    "Client",
    "Completion",
    "Delta",
    "Finish",
    "Prompt",
    "RpcFailedError",
    "ServerInfo",
    "TokenLogprob",
    "collect",
]
