"""The progress bar of a batch, as vLLM shows it."""

import time
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm

from jengine.outputs import RequestOutput
from jengine.sync_engine import SyncEngine

Progress = bool | Callable[..., Any]  # a callable makes the progress bar, as tqdm does


def run_with_progress(
    engine: SyncEngine, request_ids: list[str], use_tqdm: Progress
) -> list[RequestOutput]:
    """Wait for requests; their outputs in order."""
    if not use_tqdm:
        return engine.run(request_ids, lambda output: None)
    make_bar = use_tqdm if callable(use_tqdm) else tqdm
    with make_bar(total=len(request_ids), desc="Processed prompts", dynamic_ncols=True) as bar:
        start = time.perf_counter()
        num_in = num_out = 0

        def show(output: RequestOutput) -> None:
            nonlocal num_in, num_out
            num_in += len(output.prompt_token_ids)
            num_out += sum(len(completion.token_ids) for completion in output.outputs)
            elapsed = max(time.perf_counter() - start, 1e-9)
            bar.set_postfix_str(
                f"input: {num_in / elapsed:.2f} toks/s, output: {num_out / elapsed:.2f} toks/s",
                refresh=False,
            )
            bar.update(1)

        return engine.run(request_ids, show)
