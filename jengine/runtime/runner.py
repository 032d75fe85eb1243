"""ModelRunner: owns everything on the device, and turns a StepPlan into a StepResult."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np

from jengine.core.plan import ScheduledRequest, StepPlan, StepResult
from jengine.errors import UnsupportedError
from jengine.runtime import memory
from jengine.runtime.batch import HostBatch, build_batch
from jengine.runtime.blueprint import Blueprint
from jengine.runtime.buckets import Bucket, pick_bucket
from jengine.runtime.expert_slots import ExpertBalancer
from jengine.runtime.forward import MIN_TOKENS, build_forward, build_logprobs, packed
from jengine.runtime.programs import EMPTY, MOVE_EXPERTS, SCORE, SET_PAGES, SET_ROW
from jengine.runtime.results import Scorer, read_logprobs, read_sampled
from jengine.runtime.row_mirror import RowMirror, is_adjusted
from jengine.runtime.shapes import num_bytes
from jengine.runtime.step import KV, StepOutput, build_step
from jengine.runtime.xla_options import TUNED_TOKENS, any_size_options


@dataclasses.dataclass(frozen=True, slots=True)
class StepHandle:
    """A dispatched step whose results are still on their way."""

    plan: StepPlan
    bucket: Bucket
    batch: HostBatch
    output: StepOutput


class Tells(Protocol):
    """The leader of an engine over several processes (`gang.py`)."""

    def tell(self, program: str, arrays: tuple[np.ndarray, ...]) -> None: ...
    def waiting(self) -> AbstractContextManager[None]: ...


class ModelRunner:
    """Parameters (flat leaves), KV arrays, per-request rows and executables of one device, or of
    all ranks of a mesh.

    `kv` and `rows` are donated to every step and replaced by its result; nobody else may hold them.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        parameters: Mapping[str, jax.Array],
        leader: Tells | None = None,
    ) -> None:
        """Makes the KV arrays. Compile before: tuning needs the memory. A leader tells the other
        processes what this one runs."""
        self.blueprint = blueprint
        self._leader = leader
        self.config = blueprint.config
        self.max_model_len = blueprint.model.max_model_len
        self.vocab_size: int = blueprint.model.cfg.vocab_size
        self.param_paths = blueprint.param_paths
        self.leaves = tuple(parameters[path] for path in self.param_paths)
        self.expert_balancer = balancer_of(blueprint)
        if self.expert_balancer is not None:
            self.leaves += tuple(
                blueprint.placement.same_on_all(table) for table in self.expert_balancer.tables()
            )
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
        self.num_data_ranks = blueprint.placement.split.data
        self._mirrors = [
            RowMirror(
                len(self.groups), some_layout.num_rows, some_layout.pages_per_seq, self._processors
            )
            for _ in range(self.num_data_ranks)
        ]
        # A step without constrained requests brings no masks along.
        self._no_masks = {
            (seqs, words): blueprint.placement.zeros_per_data_rank(
                (self.num_data_ranks * seqs, words), np.int32
            )
            for seqs, words in {layout.mask_shape for layout in self._layouts.values()}
        }
        self._scorer = Scorer(partial(self._call, SCORE), self.spec.num_logprobs)

        options = any_size_options(blueprint.placement.device.platform, self.spec.batch_invariant)

        def on_ranks(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
            on_rank = blueprint.placement.on_ranks(function, (self.leaves, 0, 0), 0)
            return jax.jit(on_rank, compiler_options=dict(options))

        self._forward = on_ranks(build_forward(self.spec))
        self._logprobs = on_ranks(build_logprobs(self.spec))

    def close(self) -> None:
        """Free the KV cache and the rows; parameters live as long as somebody refers to them."""
        self.programs.close()
        for array in jax.tree.leaves((self.kv, self.rows, self._no_masks)):
            if not array.is_deleted():
                array.delete()

    def dispatch(self, plan: StepPlan) -> StepHandle:
        """Start a plan and return at once. Plans run on the device in dispatch order."""
        bucket = self.pick_bucket((plan,))
        batch = self.build(plan, bucket)
        output = self.launch(bucket, (batch,))
        output.sampled.copy_to_host_async()
        return StepHandle(plan, bucket, batch, output)

    def build(self, plan: StepPlan, bucket: Bucket, rank: int = 0) -> HostBatch:
        """The batch of a data rank, whose new requests get their rows."""
        for item in plan.scheduled:
            if item.is_admitted:
                self._admit(item, rank)
        return build_batch(plan, self._layouts[bucket], self._mirrors[rank])

    def launch(self, bucket: Bucket, batches: Sequence[HostBatch]) -> StepOutput:
        """Run the step of a bucket over the batch of each data rank."""
        if self.expert_balancer is not None:
            self.expert_balancer.before_step(lambda: np.asarray(self.rows.slot_load), self._move)
        inputs = _joined([batch.packed for batch in batches])
        if all(batch.masks is None for batch in batches):
            return self._call(str(bucket), inputs)
        none = np.zeros(self._layouts[bucket].mask_shape, np.int32)
        masks = _joined([none if batch.masks is None else batch.masks for batch in batches])
        return self._call(str(bucket), inputs, masks)

    def execute(self, name: str, arrays: Sequence[np.ndarray]) -> Any:
        """Run a program over our state and these arguments. Whoever follows a leader does what it
        does by this alone.
        """
        program = self.programs[name]
        if name in (SET_ROW, SET_PAGES):
            self.rows = program(self.rows, *arrays)
            return None
        if name == SCORE:
            return program(self.leaves, *arrays)
        if name == MOVE_EXPERTS:
            return self._move_layer(int(arrays[0]), program, arrays[1:])
        inputs, *masks = arrays
        if not masks:
            masks = [self._no_masks[self.blueprint.table.layouts_by_name[name].mask_shape]]
        self.kv, self.rows, output = program(self.leaves, self.kv, self.rows, inputs, *masks)
        return output

    def collect(self, handle: StepHandle) -> StepResult:
        """Wait for a plan's last step and read what its requests asked for."""
        plan, output = handle.plan, handle.output
        with nullcontext() if self._leader is None else self._leader.waiting():
            sampled = np.asarray(output.sampled)
        token_ids, failed = read_sampled(sampled, plan)
        logprobs = prompt_logprobs = None
        if handle.batch.has_logprobs:
            logprobs = read_logprobs(
                output,
                plan.scheduled,
                token_ids,
                self.spec.num_logprobs,
                self.spec.logprobs_mode,
            )
            logprobs = self._scorer.name(output.hidden, plan.scheduled, logprobs)
        if handle.batch.has_prompt_logprobs:
            prompt_logprobs = self._scorer.read(output.hidden, plan.scheduled)
        return StepResult(token_ids, logprobs, prompt_logprobs, failed)

    @property
    def params(self) -> dict[str, jax.Array]:
        """Live parameters by path. On several devices the parts of all ranks, one after another
        (`sharding/cut.py`).
        """
        return dict(zip(self.param_paths, self.leaves, strict=False))  # behind them: tables

    @property
    def model(self) -> Any:
        """The live NNX module over the engine's own parameters. Raises `UnsupportedError` on
        several devices: there it exists in parts only.
        """
        if not self.blueprint.placement.is_one_device:
            raise UnsupportedError("model: split over several devices, there is no whole module")
        return self.spec.model(self.leaves)

    def step_fn(self, bucket: Bucket | None = None) -> Callable[..., Any]:
        """The pure, untransformed step function of a bucket (the smallest by default); on several
        devices that of one rank, as `jax.shard_map` runs it.
        """
        return build_step(self.spec, self._layouts[bucket or self.buckets[0]])

    def hidden_states(self, token_ids: Sequence[int]) -> jax.Array:
        """Final hidden states [T, D] of one text, outside the engine's cache.

        Texts are padded to powers of two; the first one of a length compiles. Raises
        `UnsupportedError` in an engine over several processes.
        """
        self._refuse_in_gang("hidden_states")
        return self._forward(self.leaves, *self._packed([token_ids]))[: len(token_ids)]

    def _packed(self, texts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        is_tuned = self.spec.batch_invariant  # see `any_size_options`
        return packed(texts, TUNED_TOKENS if is_tuned else MIN_TOKENS)

    def logprobs(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """f32[len(text)] of each text, by one pass over all of them: see `build_logprobs`."""
        self._refuse_in_gang("logprobs")
        scores = np.asarray(self._logprobs(self.leaves, *self._packed(texts)))
        ends = np.cumsum([len(text) for text in texts])
        return np.split(scores[: ends[-1]], ends[:-1])

    def logprobs_fn(self) -> Callable[[Mapping[str, jax.Array], Any, Any], jax.Array]:
        """`build_logprobs` of parameters by path, jitted."""
        num = len(self.param_paths)
        return lambda params, token_ids_T, lengths_S: self._logprobs(
            tuple(params[path] for path in self.param_paths) + self.leaves[num:],
            token_ids_T,
            lengths_S,
        )

    def pick_bucket(self, plans: Sequence[StepPlan]) -> Bucket:
        """The cheapest of those that are ready and hold every data rank's plan."""
        buckets = self.programs.usable_buckets
        sizes = [(plan.tokens_per_step, len(plan.scheduled)) for plan in plans]
        if plans[0].num_steps > 1:
            buckets = tuple(bucket for bucket in buckets if bucket.is_decode)
        elif any(num_tokens != num_seqs for num_tokens, num_seqs in sizes):
            buckets = tuple(bucket for bucket in buckets if not bucket.is_decode)
        num_tokens, num_seqs = map(max, zip(*sizes, strict=True))
        return pick_bucket(buckets, num_tokens, num_seqs)

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

    def _admit(self, item: ScheduledRequest, rank: int) -> None:
        mirror = self._mirrors[rank]
        # Rows are counted through all data ranks.
        row = np.asarray(rank * mirror.num_rows + item.row, np.int32)
        tables = mirror.admit(item)
        if tables is not None:
            self._call(SET_PAGES, row, tables)
        if is_adjusted(item.request.sampling, self._processors):
            self._set_row(item, row)

    def _set_row(self, item: ScheduledRequest, row: np.ndarray) -> None:
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
        self._call(SET_ROW, row, counts, prompt_mask, bias)

    def _move(self, layer: int, arrays: tuple[np.ndarray, ...]) -> None:
        self._call(MOVE_EXPERTS, np.asarray(layer, np.int32), *arrays)

    def _move_layer(
        self, index: int, program: Callable[..., Any], arrays: Sequence[np.ndarray]
    ) -> None:
        layer = self.blueprint.table.expert_layers[index]
        moved, table = program(tuple(self.leaves[i] for i in layer.weights), *arrays)
        places = (*layer.weights, layer.table)
        changed = dict(zip(places, (*moved, table), strict=True))
        self.leaves = tuple(changed.get(i, leaf) for i, leaf in enumerate(self.leaves))

    def _refuse_in_gang(self, name: str) -> None:
        if self._leader is not None:
            raise UnsupportedError(f"{name}: not in an engine over several processes")

    def _call(self, name: str, *arrays: np.ndarray) -> Any:
        if self._leader is not None:
            self._leader.tell(name, arrays)
        return self.execute(name, arrays)


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Of data ranks, one after another."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def balancer_of(blueprint: Blueprint) -> ExpertBalancer | None:
    layers = blueprint.table.expert_layers
    if not layers:
        return None
    return ExpertBalancer(
        blueprint.config.parallel.eplb,
        blueprint.model.expert_slots,
        len(layers),
        blueprint.table.leaves[layers[0].table].shape,
        blueprint.placement.split.ways("experts"),
    )
