"""The pure step function: embedding, layers, logits, sampling, logprobs in one program; and the
loop around it, for decode steps that need nobody in between.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jengine.config import LogprobsMode
from jengine.kv_spec import KVGroup
from jengine.layers.attention import AttentionMetadata, slot_mapping, state_slots
from jengine.layers.expert_slots import SlotLoad
from jengine.layers.sampling import (
    Logprobs,
    RowState,
    count_sampled,
    logprobs,
    processed_logits,
    sample,
)
from jengine.logits_processors import LogitsProcessor
from jengine.runtime.batch import PENDING, BatchLayout, DeviceBatch, unpack_batch
from jengine.runtime.logits_processing import build_process
from jengine.sharding import collectives

KV = tuple[jax.Array, ...]
Leaves = tuple[jax.Array, ...]  # parameters, then tables of experts' slots
Tables = tuple[jax.Array, ...]  # page tables of a batch: per KV group, i32[S, M]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepOutput:
    """What stays on the device until it is asked for. `sampled` is copied to the host after every
    dispatch; the rest is of the last step.
    """

    sampled: jax.Array  # i32[2, steps, S]: token ids; 1 where the row's logits are finite
    logprobs: Logprobs
    logits: jax.Array | None  # f32[S, V], that log-probabilities are of; if it `keeps_logits`
    hidden: jax.Array  # [T, D] after the last norm


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """Everything static about a step but its bucket."""

    graphdef: Any  # nnx.GraphDef of the model
    params_treedef: Any  # of (parameters, tables of slots)
    groups: tuple[KVGroup, ...]
    num_logprobs: int
    keeps_logits: bool  # for log-probabilities of the whole vocabulary, which the host computes
    logprobs_mode: LogprobsMode = "raw_logprobs"
    batch_invariant: bool = True  # see `platform.is_batch_invariant`
    logits_processors: tuple[LogitsProcessor, ...] = ()

    @property
    def group_of_layer(self) -> tuple[int, ...]:
        owner = {layer: g for g, group in enumerate(self.groups) for layer in group.layers}
        return tuple(owner[layer] for layer in range(len(owner)))

    def model(self, params: Sequence[jax.Array]) -> Any:
        """The module over these leaves. Merging happens while tracing only."""
        return nnx.merge(self.graphdef, *jax.tree.unflatten(self.params_treedef, list(params)))


def build_step(
    spec: StepSpec, layout: BatchLayout
) -> Callable[..., tuple[KV, RowState, StepOutput]]:
    """The program of one bucket: `step(params, kv, rows, packed, masks) -> (kv, rows,
    StepOutput)`; donates kv and rows.

    With `layout.max_steps` > 1 it runs as many decode steps as the batch says, 1 among them. The
    trip count is data: one executable serves every number of steps, and on a GPU the whole loop
    becomes one graph, whose condition the device decides.
    """

    process = build_process(spec.logits_processors)

    def one_step(
        params: Leaves, kv: KV, rows: RowState, tables: Tables, batch: DeviceBatch
    ) -> tuple[KV, RowState, _Sampled]:
        model = spec.model(params)
        token_ids_T = _resolve_pending(batch, rows)
        hidden_TD, kv = model(token_ids_T, kv, attention_metadata(spec, layout, tables, batch))
        rows = _count_slots(rows, model)
        logits_SV = model.logits(hidden_TD[batch.last_token_index], batch.num_seqs)
        ids_S, is_finite_S = sample(logits_SV, rows, batch.sampling, process)
        if spec.logprobs_mode.startswith("processed"):
            logits_SV = processed_logits(logits_SV, rows, batch.sampling, process)
        rows = count_sampled(rows, batch.sampling, ids_S, batch.samples)
        sampled = jnp.stack([ids_S, is_finite_S.astype(jnp.int32)])
        return kv, rows, _Sampled(sampled, logits_SV, hidden_TD)

    def steps(
        params: Leaves, kv: KV, rows: RowState, tables: Tables, batch: DeviceBatch
    ) -> tuple[KV, RowState, _Sampled, jax.Array]:
        shapes = jax.eval_shape(one_step, params, kv, rows, tables, batch)[2]
        last = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        sampled = jnp.zeros((2, layout.max_steps, layout.num_seqs), jnp.int32)

        def body(carry: Any) -> Any:
            i, kv, rows, _, sampled = carry
            kv, rows, last = one_step(params, kv, rows, tables, _after(batch, i))
            sampled = jax.lax.dynamic_update_index_in_dim(sampled, last.sampled, i, axis=1)
            return i + 1, kv, rows, last, sampled

        _, kv, rows, last, sampled = jax.lax.while_loop(
            lambda carry: carry[0] < batch.num_steps,
            body,
            (jnp.int32(0), kv, rows, last, sampled),
        )
        return kv, rows, last, sampled

    def step(
        params: tuple[jax.Array, ...],
        kv: KV,
        rows: RowState,
        packed: jax.Array,
        masks: jax.Array,
    ) -> tuple[KV, RowState, StepOutput]:
        batch = unpack_batch(packed, masks, layout)
        rows = dataclasses.replace(rows, page_tables=_grown_tables(rows, batch))
        tables = tuple(
            table.at[batch.sampling.rows].get(mode="fill", fill_value=0)
            for table in rows.page_tables
        )
        if layout.max_steps == 1:
            kv, rows, last = one_step(params, kv, rows, tables, batch)
            sampled = last.sampled[:, None]
        else:
            kv, rows, last, sampled = steps(params, kv, rows, tables, batch)
        # Outside of the loop: a top-k that the device cannot capture would keep all of it out of
        # the graph.
        any_logprobs = batch.sampling.any_logprobs
        scores = logprobs(
            last.logits,
            last.sampled[0],
            spec.num_logprobs,
            any_logprobs,
            is_normalised=spec.logprobs_mode.endswith("logprobs"),
        )
        logits_SV = last.logits if spec.keeps_logits else None
        return kv, rows, StepOutput(sampled, scores, logits_SV, last.hidden)

    return step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Sampled:
    """Of one step: what `StepOutput` holds, but for log-probabilities."""

    sampled: jax.Array  # i32[2, S]
    logits: jax.Array
    hidden: jax.Array


def _after(batch: DeviceBatch, num_steps: jax.Array) -> DeviceBatch:
    """The batch of pure decodes as it stands after so many steps: every request is that much
    longer, and its newest token is in the row state. (After none it may be any batch.)"""
    grown_S = num_steps * batch.samples.astype(jnp.int32)  # padding stays empty
    token_ids_T = jnp.where(num_steps > 0, PENDING, batch.token_ids)
    return dataclasses.replace(
        batch,
        token_ids=token_ids_T,
        positions=batch.positions + num_steps,
        kv_lens=batch.kv_lens + grown_S,
        sampling=dataclasses.replace(
            batch.sampling, positions=batch.sampling.positions + num_steps
        ),
    )


def attention_metadata(
    spec: StepSpec, layout: BatchLayout, tables: Tables, batch: DeviceBatch
) -> AttentionMetadata:
    page_size = spec.groups[0].page_size
    slots = tuple(
        state_slots(table, batch.cu_q_lens, batch.kv_lens, page_size)
        if group.spec.is_state
        else slot_mapping(
            table,
            batch.seq_ids,
            batch.positions,
            batch.num_tokens,
            page_size,
            group.spec.tokens_per_entry,
        )
        for group, table in zip(spec.groups, tables, strict=True)
    )
    return AttentionMetadata(
        positions=batch.positions,
        seq_ids=batch.seq_ids,
        cu_q_lens=batch.cu_q_lens,
        kv_lens=batch.kv_lens,
        num_tokens=batch.num_tokens,
        num_seqs=batch.num_seqs,
        page_tables=tables,
        slots=slots,
        group_of_layer=spec.group_of_layer,
        is_decode=layout.num_tokens == layout.num_seqs,  # see `Bucket.is_decode`
    )


def _count_slots(rows: RowState, model: nnx.Module) -> RowState:
    if rows.slot_load is None:
        return rows
    loads = jax.tree.leaves(nnx.state(model, SlotLoad))  # in the order of layers
    if len(loads) != rows.slot_load.shape[1]:
        raise ValueError("enable_eplb: the model has experts that take no part in its steps")
    return dataclasses.replace(rows, slot_load=rows.slot_load + jnp.stack(loads)[None])


def build_score(spec: StepSpec) -> Callable[..., tuple[Logprobs, jax.Array]]:
    """`score(params, hidden [R, D], targets i32[R]) -> (Logprobs, logits f32[R, V])`: prompt
    log-probabilities.
    """

    def score(
        params: tuple[jax.Array, ...], hidden_RD: jax.Array, targets_R: jax.Array
    ) -> tuple[Logprobs, jax.Array]:
        num_rows = jnp.int32(targets_R.shape[0])
        logits_RV = spec.model(params).logits(hidden_RD, num_rows)
        return logprobs(logits_RV, targets_R, spec.num_logprobs, jnp.bool_(True)), logits_RV

    return score


def set_row(
    rows: RowState, row: jax.Array, counts_V: jax.Array, prompt_V: jax.Array, bias_V: jax.Array
) -> RowState:
    """Set the per-request tables of one row on admission. Donates `rows`."""
    row = _own_row(rows, row)
    return dataclasses.replace(
        rows,
        output_counts=rows.output_counts.at[row].set(counts_V),
        prompt_mask=rows.prompt_mask.at[row].set(prompt_V),
        bias=rows.bias.at[row].set(bias_V),
    )


def set_pages(rows: RowState, row: jax.Array, pages_GM: jax.Array) -> RowState:
    """Set the page tables of one row on admission. Donates `rows`."""
    row = _own_row(rows, row)
    tables = tuple(table.at[row].set(pages_GM[g]) for g, table in enumerate(rows.page_tables))
    return dataclasses.replace(rows, page_tables=tables)


def _own_row(rows: RowState, row: jax.Array) -> jax.Array:
    """Of a row counted through all data ranks: this rank's own, or one past its last, which is
    nobody's and not written."""
    if not collectives.are_split_together("tokens", "tokens"):
        return row
    num_rows = rows.last_token.shape[0]
    own = row - collectives.rank_in("tokens") * num_rows
    return jnp.where((own >= 0) & (own < num_rows), own, num_rows)


def _grown_tables(rows: RowState, batch: DeviceBatch) -> tuple[jax.Array, ...]:
    """i32[R, M] per group, with the pages that the host has given out for this step."""
    return tuple(
        table.reshape(-1)
        .at[batch.page_slots[g]]
        .set(batch.page_ids[g], mode="drop", unique_indices=True)
        .reshape(table.shape)
        for g, table in enumerate(rows.page_tables)
    )


def _resolve_pending(batch: DeviceBatch, rows: RowState) -> jax.Array:
    """Token ids, with those that never left the device read from the row state."""
    row_T = batch.sampling.rows[batch.seq_ids]
    newest_T = rows.last_token.at[row_T].get(mode="clip")
    return jnp.where(batch.token_ids < 0, newest_T, batch.token_ids)
