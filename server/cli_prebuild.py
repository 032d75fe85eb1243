"""`jengine prebuild`: a table of what was compiled."""

from __future__ import annotations

import logging

from rich.console import Console
from rich.table import Table

from jengine.config import EngineConfig

console = Console()


def run(config: EngineConfig) -> None:
    from jengine.prebuild import prebuild  # imports jax

    logging.basicConfig(format="%(message)s")
    logging.getLogger("jengine").setLevel(logging.INFO)
    built = prebuild(config)
    table = Table(title="Executables")
    for column in ("name", "seconds", "", "bytes"):
        table.add_column(column, justify="right" if column in ("seconds", "bytes") else "left")
    for entry in built.executables:
        how = "compiled" if entry.was_compiled else "was there"
        table.add_row(entry.name, f"{entry.seconds:.2f}", how, f"{entry.num_bytes:,}")
    console.print(table)
    num_compiled = sum(entry.was_compiled for entry in built.executables)
    total = sum(entry.num_bytes for entry in built.executables)
    pages = " + ".join(f"{n:,}" for n in built.num_pages)
    console.print(
        f"{len(built.executables)} executables ({num_compiled} compiled, {total / 2**20:.1f} MiB) "
        f"for {pages} pages in {built.folder}",
        highlight=False,
        soft_wrap=True,
    )
