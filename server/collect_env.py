"""`jengine collect-env`: what a bug report needs. JAX is asked in a process of its own, so that its
absence or a broken driver is a line in the report instead of the report's end.
"""

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jengine import __version__
from jengine.config import cache_root
from jengine.loading.pull import PULLABLE, pulled_path

PACKAGES = (
    *("jax", "jaxlib", "flax", "numpy", "ml_dtypes", "tokenizers", "safetensors", "gguf"),
    *("grpcio", "protobuf", "smg-grpc-proto", "starlette", "uvicorn", "uvloop", "pyzmq"),
    *("msgspec", "prometheus_client", "torch", "transformers", "vllm"),
)
DEVICE_CODE = (
    "import jax, json, os; print(json.dumps({'devices': [str(d) for d in jax.devices()], "
    "'backend': jax.default_backend(), 'xla_flags': os.environ.get('XLA_FLAGS', ''), "
    "'jax_platforms': os.environ.get('JAX_PLATFORMS', '')}))"
)
DEVICE_SECONDS = 120


def run(output_json: Path | None) -> None:
    report = collect()
    table = Table(title="jengine environment", show_header=False)
    for name, value in report.items():
        shown = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
        table.add_row(name, shown)
    Console().print(table)
    if output_json is not None:
        output_json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def collect() -> dict[str, Any]:
    report: dict[str, Any] = {
        "jengine": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": _num_cpus(),
    }
    report |= {name: found for name in PACKAGES if (found := _version(name)) is not None}
    report |= _devices()
    root = cache_root()
    report["cache"] = str(root)
    report["cache_bytes"] = {
        folder.name: sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        for folder in (sorted(root.iterdir()) if root.is_dir() else ())
        if folder.is_dir()
    }
    report["executables"] = len(list((root / "executables").rglob("*"))) if root.is_dir() else 0
    report["pulled_models"] = [name for name in PULLABLE if pulled_path(name) is not None]
    return report


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _num_cpus() -> int:
    """Those this process may use, which in a container are fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else (os.cpu_count() or 1)


def _devices() -> dict[str, Any]:
    try:
        done = subprocess.run(
            [sys.executable, "-c", DEVICE_CODE],
            capture_output=True,
            text=True,
            timeout=DEVICE_SECONDS,
            check=True,
        )
        return json.loads(done.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError) as error:
        return {"devices": f"unknown: {error}"}
