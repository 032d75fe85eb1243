"""ModelRunner: owns everything on the device, and turns a StepPlan into a StepResult."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jengine.config import EngineConfig
from jengine.core.plan import ScheduledRequest, StepPlan, StepResult
from jengine.models.loader import load_parameters, open_model
from jengine.runtime import memory
from jengine.runtime.batch import HostBatch, build_batch
from jengine.runtime.blueprint import (
    Blueprint,
    device_placement,
    draw_blueprint,
    open_artifacts,
)
from jengine.runtime.buckets import Bucket, pick_bucket
from jengine.runtime.forward import build_forward, build_logprobs, packed
from jengine.runtime.memory import open_device
from jengine.runtime.programs import EMPTY, SET_PAGES, SET_ROW
from jengine.runtime.results import PromptScorer, read_logprobs, read_sampled
from jengine.runtime.row_mirror import RowMirror, is_adjusted
from jengine.runtime.shapes import num_bytes
from jengine.runtime.step import KV, StepOutput, build_step


def load_runner(config: EngineConfig) -> "ModelRunner":
    """A runner whose programs compile as they are needed; an engine prepares them ahead."""
    device, device_memory = open_device(config.cache)
    model = open_model(config)
    artifacts = open_artifacts(config, device)
    blueprint = draw_blueprint(config, model, device, device_memory, artifacts)
    return ModelRunner(blueprint, load_parameters(model, device_placement(device)))


@dataclasses.dataclass(frozen=True, slots=True)
class StepHandle:
    """A dispatched step whose results are still on their way."""

    plan: StepPlan
    bucket: Bucket
    batch: HostBatch
    output: StepOutput


class ModelRunner:
    """Parameters (flat leaves), KV arrays, per-request rows and executables of one device.

    `kv` and `rows` are donated to every step and replaced by its result; nobody else may hold them.
    """

    def __init__(self, blueprint: Blueprint, parameters: Mapping[str, jax.Array]) -> None:
        """Makes the KV arrays. Compile before: tuning needs the memory."""
        self.blueprint = blueprint
        self.config = blueprint.config
        self.max_model_len = blueprint.model.max_model_len
        self.vocab_size: int = blueprint.model.cfg.vocab_size
        self.param_paths = blueprint.param_paths
        self.leaves = tuple(parameters[path] for path in self.param_paths)
        self.spec = blueprint.table.spec
        self.groups = self.spec.groups
        self.buckets = blueprint.buckets
        self.max_decode_steps = blueprint.max_decode_steps
        self.num_pages = blueprint.num_pages
        self.programs = blueprint.programs
        self.kv: KV
        self.kv, self.rows = self.programs[EMPTY]()
        self._layouts = blueprint.table.layouts
        some_layout = self._layouts[self.buckets[0]]
        self._processors = tuple(p.info for p in self.spec.logits_processors)
        self._mirror = RowMirror(
            len(self.groups), some_layout.num_rows, some_layout.pages_per_seq, self._processors
        )
        # A step without constrained requests brings no masks along.
        self._no_masks = {
            shape: jax.device_put(np.zeros(shape, np.int32), blueprint.table.placement)
            for shape in {layout.mask_shape for layout in self._layouts.values()}
        }
        self._scorer = PromptScorer(self.programs, self.leaves, self.spec.num_logprobs)
        self._forward = jax.jit(build_forward(self.spec))
        self._logprobs = jax.jit(build_logprobs(self.spec))

    def close(self) -> None:
        """Free the KV cache and the rows; parameters live as long as somebody refers to them."""
        self.programs.close()
        for array in jax.tree.leaves((self.kv, self.rows, self._no_masks)):
            if not array.is_deleted():
                array.delete()

    def dispatch(self, plan: StepPlan) -> StepHandle:
        """Start a plan and return at once. Plans run on the device in dispatch order."""
        for item in plan.scheduled:
            if item.is_admitted:
                self._admit(item)
        bucket = self._pick_bucket(plan)
        layout = self._layouts[bucket]
        batch = build_batch(plan, layout, self._mirror)
        masks = self._no_masks[layout.mask_shape] if batch.masks is None else batch.masks
        step = self.programs[str(bucket)]
        self.kv, self.rows, output = step(self.leaves, self.kv, self.rows, batch.packed, masks)
        output.sampled.copy_to_host_async()
        return StepHandle(plan, bucket, batch, output)

    def collect(self, handle: StepHandle) -> StepResult:
        """Wait for a plan's last step and read what its requests asked for."""
        plan, output = handle.plan, handle.output
        token_ids, failed = read_sampled(np.asarray(output.sampled), plan)
        logprobs = prompt_logprobs = None
        if handle.batch.has_logprobs:
            logprobs = read_logprobs(
                output,
                plan.scheduled,
                token_ids,
                self.spec.num_logprobs,
                self.spec.logprobs_mode,
            )
        if handle.batch.has_prompt_logprobs:
            prompt_logprobs = self._scorer.read(output.hidden, plan.scheduled)
        return StepResult(token_ids, logprobs, prompt_logprobs, failed)

    @property
    def params(self) -> dict[str, jax.Array]:
        """Live parameters by path."""
        return dict(zip(self.param_paths, self.leaves, strict=True))

    @property
    def model(self) -> Any:
        """The live NNX module over the engine's own parameters."""
        return self.spec.model(self.leaves)

    def step_fn(self, bucket: Bucket | None = None) -> Callable[..., Any]:
        """The pure, untransformed step function of a bucket (the smallest by default)."""
        return build_step(self.spec, self._layouts[bucket or self.buckets[0]])

    def hidden_states(self, token_ids: Sequence[int]) -> jax.Array:
        """Final hidden states [T, D] of one text, outside the engine's cache.

        Texts are padded to powers of two; the first one of a length compiles.
        """
        return self._forward(self.leaves, *packed([token_ids]))[: len(token_ids)]

    def logprobs(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """f32[len(text)] of each text, by one pass over all of them: see `build_logprobs`."""
        scores = np.asarray(self._logprobs(self.leaves, *packed(texts)))
        ends = np.cumsum([len(text) for text in texts])
        return np.split(scores[: ends[-1]], ends[:-1])

    def logprobs_fn(self) -> Callable[[Mapping[str, jax.Array], Any, Any], jax.Array]:
        """`build_logprobs` of parameters by path, jitted."""
        return lambda params, token_ids_T, lengths_S: self._logprobs(
            tuple(params[path] for path in self.param_paths), token_ids_T, lengths_S
        )

    def _pick_bucket(self, plan: StepPlan) -> Bucket:
        """The cheapest of those that are ready."""
        buckets = self.programs.usable_buckets
        if plan.num_steps > 1:
            buckets = tuple(bucket for bucket in buckets if bucket.is_decode)
        return pick_bucket(buckets, plan.tokens_per_step, len(plan.scheduled))

    def memory_plan(self) -> memory.MemoryPlan:
        """The plan over every executable prepared so far."""
        return memory.MemoryPlan(
            parameters=num_bytes(self.leaves),
            kv_cache=num_bytes(self.kv),
            row_state=num_bytes(self.rows),
            executables=self.programs.memory(),
            num_pages=self.num_pages,
            groups=self.groups,
            device=self.blueprint.device_memory,
            reserve=self.blueprint.reserve,
        )

    def _admit(self, item: ScheduledRequest) -> None:
        tables = self._mirror.admit(item)
        if tables is not None:
            self.rows = self.programs[SET_PAGES](self.rows, np.int32(item.row), tables)
        if is_adjusted(item.request.sampling, self._processors):
            self._set_row(item)

    def _set_row(self, item: ScheduledRequest) -> None:
        """Set the tables of a request that uses penalties or bias. Its tokens are all known when it
        is admitted.
        """
        request, p = item.request, item.request.sampling
        counts = np.bincount(request.output_token_ids, minlength=self.vocab_size).astype(np.int32)
        prompt_mask = np.zeros(self.vocab_size, np.bool_)
        prompt_mask[request.prompt_token_ids] = True
        if p.allowed_token_ids is None:
            bias = np.zeros(self.vocab_size, np.float32)
        else:
            bias = np.full(self.vocab_size, -np.inf, np.float32)
            bias[p.allowed_token_ids] = 0.0
        for token_id, value in (p.logit_bias or {}).items():
            bias[token_id] += value
        self.rows = self.programs[SET_ROW](self.rows, np.int32(item.row), counts, prompt_mask, bias)
