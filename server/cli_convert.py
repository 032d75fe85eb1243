"""`jengine convert`: a bar, then what lies where."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from tqdm import tqdm

from jengine.config import EngineConfig

console = Console()


def run(config: EngineConfig, folder: Path) -> None:
    from jengine.convert import convert  # imports jax

    with tqdm(desc="weights", unit="B", unit_scale=True, disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        convert(config, folder, progress)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    console.print(f"{size / 2**30:.2f} GiB in {folder}", highlight=False, soft_wrap=True)
