"""ModelRunner: owns everything on the device, and turns a StepPlan into a StepResult."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jengine.config import EngineConfig, cache_root
from jengine.core.plan import ScheduledRequest, StepPlan, StepResult
from jengine.kv_spec import build_groups
from jengine.layers.param import abstract_parameters
from jengine.layers.sampling import RowState
from jengine.models.loader import LoadedModel
from jengine.runtime import memory
from jengine.runtime.aot import ExecutableStore, executable_key
from jengine.runtime.batch import BatchLayout, HostBatch, build_batch
from jengine.runtime.buckets import Bucket, build_buckets, pick_bucket
from jengine.runtime.decode_steps import choose_max_decode_steps
from jengine.runtime.forward import build_forward
from jengine.runtime.programs import SET_PAGES, SET_ROW, Programs
from jengine.runtime.results import PromptScorer, read_logprobs, read_sampled
from jengine.runtime.row_mirror import RowMirror, is_adjusted
from jengine.runtime.step import KV, StepOutput, StepSpec, build_step

DEFAULT_TOP = (
    20  # log-probabilities computed in the step; more are made from the logits on the host
)


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

    def __init__(self, config: EngineConfig, loaded: LoadedModel, device: jax.Device) -> None:
        self.config = config
        self.device = device
        self.max_model_len = loaded.max_model_len
        self.vocab_size: int = loaded.cfg.vocab_size
        self.param_paths = tuple(abstract_parameters(loaded.module))
        self.leaves = tuple(loaded.parameters[path] for path in self.param_paths)
        self.groups = build_groups(type(loaded.module).kv_specs(loaded.cfg), config.cache.page_size)
        graphdef, state = nnx.split(loaded.module)
        num_top = min(
            config.max_logprobs if config.max_logprobs > 0 else DEFAULT_TOP, self.vocab_size
        )
        self.spec = StepSpec(graphdef, jax.tree.structure(state), self.groups, num_top)
        self.buckets = build_buckets(config.compile, config.scheduler)
        self.max_decode_steps = config.scheduler.max_decode_steps or choose_max_decode_steps(
            device.platform, _num_bytes(self.leaves)
        )
        self.num_pages = self._plan_pages()
        self.kv: KV = self._init_kv()
        self.rows = self._init_rows()
        self._mirror = RowMirror(
            len(self.groups), config.scheduler.max_num_seqs, self._pages_per_seq
        )
        self._decode_buckets = tuple(bucket for bucket in self.buckets if bucket.is_decode)
        self._layouts = {bucket: self._layout(bucket) for bucket in self.buckets}
        self.programs = Programs(
            self.spec,
            self._layouts,
            self._open_store(loaded),
            (self.leaves, self.kv, self.rows),
            jax.ShapeDtypeStruct((loaded.cfg.hidden_size,), jnp.dtype(loaded.cfg.dtype)),
        )
        self._scorer = PromptScorer(self.programs, self.leaves, num_top)
        self._forward = jax.jit(build_forward(self.spec))

    def warm_up(self) -> None:
        """Load or compile every executable, in threads. After this nothing compiles."""
        self.programs.warm_up(self.config.compile.compile_threads)

    def dispatch(self, plan: StepPlan) -> StepHandle:
        """Start a plan and return at once. Plans run on the device in dispatch order."""
        for item in plan.scheduled:
            if item.is_admitted:
                self._admit(item)
        bucket = self._pick_bucket(plan)
        batch = build_batch(plan, self._layouts[bucket], self._mirror)
        step = self.programs[str(bucket)]
        self.kv, self.rows, output = step(self.leaves, self.kv, self.rows, batch.packed)
        output.sampled.copy_to_host_async()
        return StepHandle(plan, bucket, batch, output)

    def collect(self, handle: StepHandle) -> StepResult:
        """Wait for a plan's last step and read what its requests asked for."""
        plan, output = handle.plan, handle.output
        token_ids, failed = read_sampled(np.asarray(output.sampled), plan)
        logprobs = prompt_logprobs = None
        if handle.batch.has_logprobs:
            logprobs = read_logprobs(output, plan.scheduled, token_ids, self.spec.num_logprobs)
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
        num_tokens = len(token_ids)
        padded = np.zeros(max(16, 1 << (num_tokens - 1).bit_length()), np.int32)
        padded[:num_tokens] = token_ids
        return self._forward(self.leaves, padded, np.int32(num_tokens))[:num_tokens]

    def _pick_bucket(self, plan: StepPlan) -> Bucket:
        return pick_bucket(
            self.buckets if plan.num_steps == 1 else self._decode_buckets,
            plan.tokens_per_step,
            len(plan.scheduled),
        )

    def _layout(self, bucket: Bucket) -> BatchLayout:
        return BatchLayout(
            num_tokens=bucket.num_tokens,
            num_seqs=bucket.num_seqs,
            num_groups=len(self.groups),
            pages_per_seq=self._pages_per_seq,
            num_rows=self.config.scheduler.max_num_seqs,
            vocab_size=self.vocab_size,
            max_steps=self.max_decode_steps if bucket.is_decode else 1,
        )

    def memory_plan(self) -> memory.MemoryPlan:
        """The plan over every executable prepared so far."""
        return memory.MemoryPlan(
            parameters=_num_bytes(self.leaves),
            kv_cache=_num_bytes(self.kv),
            row_state=_num_bytes(self.rows),
            executables={
                name: memory.executable_memory(e) for name, e in self.programs.ready.items()
            },
            num_pages=self.num_pages,
            page_size=self.config.cache.page_size,
            budget=memory.memory_budget(self.device, self.config.cache),
        )

    @property
    def _pages_per_seq(self) -> int:
        return -(-self.max_model_len // self.config.cache.page_size)

    def _open_store(self, loaded: LoadedModel) -> ExecutableStore:
        if not self.config.compile.keep_executables:
            return ExecutableStore(None, "", self.device)
        folder = Path(self.config.compile.cache_dir or cache_root() / "executables")
        facts = (
            self.num_pages,
            self.spec.num_logprobs,
            self.config.scheduler.max_num_seqs,
            self.max_decode_steps,
        )
        key = executable_key(self.device, loaded.cfg, self.groups, self.max_model_len, facts)
        return ExecutableStore(folder, key, self.device)

    def _plan_pages(self) -> tuple[int, ...]:
        budget = memory.memory_budget(self.device, self.config.cache)
        return memory.plan_pages(
            self.groups,
            self.config.cache,
            free_bytes=budget - _num_bytes(self.leaves),
            is_cpu=self.device.platform == "cpu",
            max_model_len=self.max_model_len,
            max_chunk=self.config.scheduler.max_num_batched_tokens,
        )

    def _init_kv(self) -> KV:
        group_of_layer = self.spec.group_of_layer
        fill = jnp.nan if self.config.cache.poison else 0.0
        kv = []
        for g in group_of_layer:
            spec = self.groups[g].spec
            shape = (self.num_pages[g], self.groups[g].page_size, *spec.entry_shape)
            kv.append(jnp.full(shape, fill, jnp.dtype(spec.dtype), device=self.device))
        return tuple(kv)

    def _init_rows(self) -> RowState:
        shape = (self.config.scheduler.max_num_seqs, self.vocab_size)
        return RowState(
            last_token=jnp.zeros(shape[:1], jnp.int32, device=self.device),
            output_counts=jnp.zeros(shape, jnp.int32, device=self.device),
            prompt_mask=jnp.zeros(shape, jnp.bool_, device=self.device),
            bias=jnp.zeros(shape, jnp.float32, device=self.device),
            page_tables=tuple(
                jnp.zeros((shape[0], self._pages_per_seq), jnp.int32, device=self.device)
                for _ in self.groups
            ),
        )

    def _admit(self, item: ScheduledRequest) -> None:
        tables = self._mirror.admit(item)
        if tables is not None:
            self.rows = self.programs[SET_PAGES](self.rows, np.int32(item.row), tables)
        if is_adjusted(item.request.sampling):
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


def _num_bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
