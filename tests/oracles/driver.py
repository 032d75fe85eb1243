"""Drives the real scheduler and runner without a front end, so that tests see logits and choose
every chunk.
"""

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jengine.config import EngineConfig
from jengine.core.kv_manager import KVManager
from jengine.core.plan import ScheduledRequest, StepPlan
from jengine.core.scheduler import Scheduler
from jengine.request import Request, SamplingParams
from jengine.runtime.runner import StepHandle
from jengine.runtime.start import load_runner


class Driver:
    """One model, one scheduler, steps on demand. Executables compile as they are needed."""

    def __init__(self, model: Path | str, **kwargs) -> None:
        defaults = dict(dtype="float32", max_num_seqs=4, max_num_batched_tokens=64, poison=True,
                        num_pages=64, keep_executables=False, max_logprobs=-1)  # fmt: skip
        self.config = EngineConfig.from_kwargs(str(model), **(defaults | kwargs))
        self.runner = load_runner(self.config)
        self.loaded = self.runner.blueprint.model
        self.step_logits: list[np.ndarray] = []
        self.hidden = np.zeros((0, 0))
        self.reset()

    def reset(self) -> None:
        """A fresh scheduler over the same device state."""
        kv = KVManager(
            self.runner.groups,
            self.runner.num_pages,
            enable_prefix_caching=self.config.cache.enable_prefix_caching,
        )
        self.scheduler = Scheduler(self.config.scheduler, kv, self.runner.max_model_len)

    def logits(self, token_ids: Sequence[int], chunks: Sequence[int]) -> np.ndarray:
        """float32 [len(token_ids), V]: logits of every position, the text given in `chunks`
        (sizes). The steps' own, of each chunk's last position, are left in `step_logits`, and the
        hidden states of all positions in `hidden`.
        """
        pages = range(-(-len(token_ids) // self.runner.groups[0].page_size))
        # Only the newest state is read again, so states may take turns in the few pages they have.
        turns = [
            num - 1 if group.spec.is_state else len(pages)
            for group, num in zip(self.runner.groups, self.runner.num_pages, strict=True)
        ]
        tables = tuple([1 + page % num for page in pages] for num in turns)
        request = Request("teacher", list(token_ids), SamplingParams(temperature=0))
        rows, hidden, start = [], [], 0
        self.step_logits = []
        for step, size in enumerate(chunks):
            item = ScheduledRequest(request, 0, start, size, tables, True, step == 0)
            handle = self.runner.dispatch(StepPlan(step, (item,), size))
            rows.append(self.all_logits(handle)[:size])
            hidden.append(np.asarray(handle.output.hidden)[:size])
            self.step_logits.append(np.asarray(handle.output.logits)[0])
            start += size
        assert start == len(token_ids)
        self.hidden = np.concatenate(hidden)
        return np.concatenate(rows)

    def all_logits(self, handle: StepHandle) -> np.ndarray:
        """Logits of every packed position of a step, by float64 from its hidden states; where the
        model scales or caps them, in float32.
        """
        model = self.runner.model
        hidden = np.asarray(handle.output.hidden).astype(np.float64)
        logits = hidden @ np.asarray(model.head).astype(np.float64).T
        cfg = model.cfg
        if cfg.logit_scale == 1.0 and cfg.logit_soft_cap is None:
            return logits
        return np.asarray(model.scale_logits(jnp.asarray(logits, jnp.float32)))

    def run(self, requests: Sequence[Request]) -> dict[str, list[int]]:
        """Serve requests to their end, one step at a time; output ids by request."""
        for request in requests:
            self.scheduler.add(request)
        while (plan := self.scheduler.schedule()) is not None:
            self.scheduler.update(plan, self.runner.collect(self.runner.dispatch(plan)))
        self.scheduler.check_integrity()
        return {r.request_id: r.output_token_ids for r in requests}
