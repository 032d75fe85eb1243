"""An EngineCore turned by hand in the test's own thread: the test chooses the interleaving."""

import time
from collections import defaultdict
from pathlib import Path

from jengine.config import EngineConfig
from jengine.engine import EngineCore
from jengine.protocol import AbortRequests, CoreOutput, CoreRequest, FromCore, StepOutputs
from jengine.request import SamplingParams


class CorePump:
    """Submits requests, turns the core, keeps what it emits."""

    def __init__(self, model: Path | str, **kwargs) -> None:
        defaults = dict(dtype="float32", load_format="dummy", max_num_seqs=4,
                        max_num_batched_tokens=32, num_pages=24, page_size=8, poison=True,
                        max_model_len=128, keep_executables=False)  # fmt: skip
        self.messages: list[FromCore] = []
        self.core = EngineCore(
            EngineConfig.from_kwargs(str(model), **(defaults | kwargs)), self.messages.append
        )
        self.core.start()

    def submit(
        self, request_id: str, prompt: list[int], params: SamplingParams, *, seed: int = 0,
        eos: list[int] | None = None, priority: int = 0, is_streamed: bool = True,
        grammar: str = "",
    ) -> None:  # fmt: skip
        # Without a grammar nobody else needs to know them.
        is_endless = params.ignore_eos and not grammar
        eos_ids = [] if is_endless else (eos if eos is not None else [2])
        self.core.submit(
            CoreRequest(
                request_id, prompt, params, eos_ids, seed, priority, "", time.time(), is_streamed,
                grammar,
            )
        )  # fmt: skip

    def abort(self, *request_ids: str) -> None:
        self.core.submit(AbortRequests(list(request_ids)))

    def turn(self) -> None:
        if self.is_busy:
            self.core.turn()

    @property
    def is_busy(self) -> bool:
        return self.core.has_work

    def drain(self) -> None:
        """Turn until nothing is left, then check pages and rows."""
        for _ in range(100_000):
            if not self.is_busy:
                break
            self.core.turn()
        self.core.scheduler.check_integrity()
        assert self.core.scheduler.is_idle

    def outputs(self) -> dict[str, list[CoreOutput]]:
        found: dict[str, list[CoreOutput]] = defaultdict(list)
        for message in self.messages:
            if isinstance(message, StepOutputs):
                for output in message.outputs:
                    found[output.request_id].append(output)
        return found

    def tokens(self) -> dict[str, list[int]]:
        return {
            request_id: [token for output in outputs for token in output.new_token_ids]
            for request_id, outputs in self.outputs().items()
        }

    def finish_reasons(self) -> dict[str, str]:
        return {
            request_id: str(outputs[-1].finish_reason)
            for request_id, outputs in self.outputs().items()
        }

    def alone(self, prompt: list[int], params: SamplingParams, **kwargs) -> list[int]:
        """The same request with nobody beside it, and no prefix cached."""
        self.drain()
        self.core.scheduler.reset_prefix_cache()
        self.messages.clear()
        self.submit("alone", prompt, params, **kwargs)
        self.drain()
        tokens = self.tokens()["alone"]
        self.messages.clear()
        return tokens
