"""What the server processes are told at start, apart from the engine's own configuration."""

from dataclasses import dataclass
from pathlib import Path

MIB = 1024 * 1024
PARSERS = ("deepseek_v4",)  # of reasoning and of calls of tools


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Addresses, limits and access. Ports: 0 draws a free one, None turns the protocol off."""

    host: str = "127.0.0.1"
    port: int | None = 8000
    grpc_port: int | None = 50051
    uds: str | None = None  # HTTP on a Unix socket instead of host:port
    api_keys: tuple[str, ...] = ()
    ssl_keyfile: Path | None = None
    ssl_certfile: Path | None = None
    ssl_ca_certs: Path | None = None  # given: gRPC clients must show a certificate signed by it
    root_path: str = ""
    grpc_reflection: bool = True
    max_body_bytes: int = 32 * MIB
    max_grpc_message_bytes: int = 64 * MIB  # one million token ids are 3 MB
    arrival_timeout: float = 60.0  # seconds in which an HTTP request must have arrived
    unread_timeout: float = 60.0  # a client that reads nothing for so long loses its request
    shutdown_timeout: float = 30.0
    dead_linger: float = 5.0  # a dead engine is reported this long before the process exits
    ping_seconds: float = 15.0  # an event stream that is silent this long gets a comment line
    enable_prompt_tokens_details: bool = True
    enable_force_include_usage: bool = False
    return_tokens_as_token_ids: bool = False
    trust_request_chat_template: bool = False
    reasoning_parser: str | None = None  # None: what the model thinks is part of its answer
    tool_call_parser: str | None = None
    enable_auto_tool_choice: bool = False
    log_requests: bool = True

    def __post_init__(self) -> None:
        if self.port is None and self.grpc_port is None and self.uds is None:
            raise ValueError("nothing to serve: both HTTP and gRPC are off")
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ValueError("--ssl-keyfile and --ssl-certfile go together")
        for name in ("reasoning_parser", "tool_call_parser"):
            if (value := getattr(self, name)) is not None and value not in PARSERS:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} must be one of {', '.join(PARSERS)}, got {value!r}")
        if self.enable_auto_tool_choice and self.tool_call_parser is None:
            raise ValueError("--enable-auto-tool-choice needs --tool-call-parser")
        for name in ("arrival_timeout", "unread_timeout"):
            if getattr(self, name) <= 0:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} must be > 0, got {getattr(self, name)}")
        if self.shutdown_timeout < 0:
            raise ValueError(f"--shutdown-timeout must be >= 0, got {self.shutdown_timeout}")
