"""Flags of `jengine serve` that its engine does not see, spelled as those of vLLM where it has
them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from jengine.server.settings import MIB, ServerSettings

_SERVER = "Server"
_CHAT = "Conversations"
_ACCESS = "Access"


def _flag(*names: str, panel: str, text: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel)


@dataclass(frozen=True)
class ServerFlags:
    """Flags of `serve` alone."""

    host: Annotated[str, _flag("--host", panel=_SERVER, text="Address of both ports.")] = (
        "127.0.0.1"
    )
    port: Annotated[int, _flag("--port", panel=_SERVER, text="HTTP; 0 draws a free one.")] = 8000
    grpc_port: Annotated[
        int, _flag("--grpc-port", panel=_SERVER, text="gRPC; 0 draws a free one.")
    ] = 50051
    http: Annotated[bool, _flag("--http/--no-http", panel=_SERVER, text="Serve HTTP.")] = True
    grpc: Annotated[bool, _flag("--grpc/--no-grpc", panel=_SERVER, text="Serve gRPC.")] = True
    uds: Annotated[
        str | None, _flag("--uds", panel=_SERVER, text="HTTP on a Unix socket instead.")
    ] = None
    root_path: Annotated[
        str, _flag("--root-path", panel=_SERVER, text="Path prefix that a proxy strips.")
    ] = ""
    shutdown_timeout: Annotated[
        float,
        _flag("--shutdown-timeout", panel=_SERVER, text="Seconds for running requests on SIGTERM."),
    ] = 30.0
    arrival_timeout: Annotated[
        float,
        _flag("--arrival-timeout", panel=_SERVER, text="Seconds for an HTTP request to arrive."),
    ] = 60.0
    unread_timeout: Annotated[
        float,
        _flag("--unread-timeout", panel=_SERVER, text="Seconds an answer may wait for its reader."),
    ] = 60.0
    max_body_bytes: Annotated[
        int, _flag("--max-body-bytes", panel=_SERVER, text="Largest HTTP body.")
    ] = 32 * MIB
    max_grpc_message_bytes: Annotated[
        int, _flag("--max-grpc-message-bytes", panel=_SERVER, text="Largest gRPC request.")
    ] = 64 * MIB
    grpc_reflection: Annotated[
        bool,
        _flag("--grpc-reflection/--no-grpc-reflection", panel=_SERVER, text="List gRPC services."),
    ] = True
    disable_frontend_multiprocessing: Annotated[
        bool,
        _flag(
            "--disable-frontend-multiprocessing",
            panel=_SERVER,
            text="Run the engine core in this process.",
        ),
    ] = False
    enable_force_include_usage: Annotated[
        bool,
        _flag("--enable-force-include-usage", panel=_SERVER, text="Usage at the end of streams."),
    ] = False
    return_tokens_as_token_ids: Annotated[
        bool,
        _flag("--return-tokens-as-token-ids", panel=_SERVER, text="Logprobs name tokens by id."),
    ] = False
    trust_request_chat_template: Annotated[
        bool,
        _flag("--trust-request-chat-template", panel=_SERVER, text="Requests may bring templates."),
    ] = False
    reasoning_parser: Annotated[
        str | None,
        _flag("--reasoning-parser", panel=_CHAT, text="Reasoning apart from answers: deepseek_v4."),
    ] = None
    tool_call_parser: Annotated[
        str | None,
        _flag("--tool-call-parser", panel=_CHAT, text="How the model writes calls: deepseek_v4."),
    ] = None
    enable_auto_tool_choice: Annotated[
        bool,
        _flag("--enable-auto-tool-choice", panel=_CHAT, text="Requests may bring tools."),
    ] = False
    log_requests: Annotated[
        bool,
        _flag(
            "--enable-log-requests/--disable-log-requests",
            panel=_SERVER,
            text="One line for each finished request.",
        ),
    ] = True
    log_level: Annotated[
        str, _flag("--log-level", "--uvicorn-log-level", panel=_SERVER, text="debug, info, ...")
    ] = "info"
    log_format: Annotated[
        str, _flag("--log-format", panel=_SERVER, text="auto, console or json.")
    ] = "auto"
    api_key: Annotated[
        list[str] | None,
        _flag("--api-key", panel=_ACCESS, text="Require this key; may be repeated."),
    ] = None
    api_key_file: Annotated[
        Path | None, _flag("--api-key-file", panel=_ACCESS, text="Keys, one a line.")
    ] = None
    ssl_keyfile: Annotated[Path | None, _flag("--ssl-keyfile", panel=_ACCESS, text="TLS key.")] = (
        None
    )
    ssl_certfile: Annotated[
        Path | None, _flag("--ssl-certfile", panel=_ACCESS, text="TLS certificate.")
    ] = None
    ssl_ca_certs: Annotated[
        Path | None, _flag("--ssl-ca-certs", panel=_ACCESS, text="Authority of clients.")
    ] = None

    def build(self) -> ServerSettings:
        keys = list(self.api_key or ())
        if self.api_key_file is not None:
            lines = self.api_key_file.read_text(encoding="utf-8").splitlines()
            keys += [line.strip() for line in lines if line.strip()]
        same = {
            f.name: getattr(self, f.name)
            for f in fields(ServerSettings)
            if f.name in _SAME_IN_SETTINGS
        }
        try:
            return ServerSettings(
                **same,
                port=self.port if self.http else None,
                grpc_port=self.grpc_port if self.grpc else None,
                api_keys=tuple(keys),
            )
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None


_SAME_IN_SETTINGS = {f.name for f in fields(ServerFlags)} - {"port", "grpc_port"}
