"""Logging of the server process: text on a terminal, JSON lines for machines elsewhere."""

import json
import logging
import sys
from typing import Any, Literal

LogFormat = Literal["auto", "console", "json"]


class JsonFormatter(logging.Formatter):
    """One JSON object a line; `extra={"fields": {...}}` is merged in."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "ts": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


class ConsoleFormatter(logging.Formatter):
    """Time, level, text, and the fields as key=value."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{key}={value}" for key, value in _fields(record).items())
        line = super().formatMessage(record)
        return f"{line}  {fields}" if fields else line


def configure(level: str = "info", log_format: LogFormat = "auto") -> None:
    """Replace the root handlers. "auto" is console on a terminal and JSON elsewhere."""
    if log_format == "auto":
        log_format = "console" if sys.stderr.isatty() else "json"
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else ConsoleFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # uvicorn's access lines would double our own line for each request.
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)


def check_format(name: str) -> LogFormat:
    if name not in ("auto", "console", "json"):
        raise ValueError(f"log format must be auto, console or json, got {name!r}")
    return name


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return record.__dict__.get("fields", {})
