"""Choosing tokens inside the step: no sort, and no random state.

Every draw is keyed by (request seed, position), so that the same request gives the same token in
any batch. The order of operations is vLLM's: masked, banned and biased logits, penalties,
temperature, min_p, top_k, top_p, draw.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jengine.pallas_kernels.argmax_rows.api import argmax_rows
from jengine.pallas_kernels.log_softmax_rows.api import log_softmax_rows
from jengine.pallas_kernels.top_k_rows.api import top_k_rows

ROWS_AT_ONCE = 64  # of logits that are sampled otherwise than greedily


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowState:
    """Per-request state on the device, one row per running request; row R (out of range) is
    nobody's.

    `output_counts`, `prompt_mask` and `bias` are set on admission, and only for requests that use
    penalties, logit_bias or allowed_token_ids.
    """

    last_token: jax.Array  # i32[R]; the newest sampled token
    output_counts: jax.Array  # i32[R, V]
    prompt_mask: jax.Array  # bool[R, V]
    bias: jax.Array  # f32[R, V]; logit_bias, and -inf outside allowed_token_ids
    page_tables: tuple[jax.Array, ...] = ()  # per KV group, i32[R, M]
    # Of no row: i32[1, layers, P], tokens so far by the slot of their experts, if those have slots.
    slot_load: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingInputs:
    """What the sampler needs of each sequence. The `any_*` flags skip work that no row asks for."""

    rows: jax.Array  # i32[S]; row of RowState, R for padding
    adjusted_rows: jax.Array  # i32[S]; the same for rows with penalties or bias, else R
    temperature: jax.Array  # f32[S]; 0 = greedy
    top_k: jax.Array  # i32[S]; 0 = all
    top_p: jax.Array  # f32[S]
    min_p: jax.Array  # f32[S]
    presence: jax.Array  # f32[S]
    frequency: jax.Array  # f32[S]
    repetition: jax.Array  # f32[S]
    seeds: jax.Array  # u32[S, 2]
    positions: jax.Array  # i32[S]; index of the token being chosen
    banned: jax.Array  # i32[S, MAX_BANNED_IDS]; V = no entry
    masked: jax.Array  # bool[S]; only the tokens of its mask may be drawn
    masks: jax.Array  # i32[S, ceil(V / 32)]; bit v % 32 of word v // 32: token v is allowed
    any_special: jax.Array  # bool[]; some row is not plain greedy
    any_adjusted: jax.Array  # bool[]; some row has penalties, bias, banned tokens or a mask
    any_truncated: jax.Array  # bool[]; some row uses min_p, top_k or top_p
    any_logprobs: jax.Array  # bool[]
    extra: jax.Array | None = None  # i32[S, E]; words of logits processors' parameters


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Logprobs:
    """Log-probabilities (or logits): of the chosen token, its rank (1 = best),
    and the best K.
    """

    chosen: jax.Array  # f32[S]
    rank: jax.Array  # i32[S]
    top_ids: jax.Array  # i32[S, K]
    top_values: jax.Array  # f32[S, K]


# What users add: (logits f32[S, V], inputs, counts of output tokens i32[S, V], tokens of the prompt
# bool[S, V]) -> logits. Comes after masks, bans and bias, before penalties (vLLM).
Process = Callable[[jax.Array, SamplingInputs, jax.Array, jax.Array], jax.Array]


def sample(
    logits_SV: jax.Array, rows: RowState, inputs: SamplingInputs, process: Process | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns (token ids i32[S], is_finite bool[S]). A row without one finite maximum is not
    finite.
    """
    best_S = argmax_rows(logits_SV)
    peak_S = jnp.take_along_axis(logits_SV, best_S[:, None], axis=1)[:, 0]
    ids_S = jax.lax.cond(
        inputs.any_special,
        lambda: _in_blocks(
            lambda logits_SV, inputs: _sample_special(logits_SV, rows, inputs, process),
            logits_SV,
            inputs,
        ),
        lambda: best_S,
    )
    if process is None:
        return ids_S, jnp.isfinite(peak_S)
    return jnp.maximum(ids_S, 0), jnp.isfinite(peak_S) & (ids_S >= 0)


def processed_logits(
    logits_SV: jax.Array,
    rows: RowState,
    inputs: SamplingInputs,
    process: Process | None = None,
) -> jax.Array:
    """f32[S, V]: what a draw is made from, -inf where it cannot fall. Greedy rows have neither
    temperature nor cuts. The logits as they are where no row asks for more.
    """

    def of_block(logits_SV: jax.Array, inputs: SamplingInputs) -> jax.Array:
        adjusted_SV = _adjusted(logits_SV, rows, inputs, process)
        x_SV, lowest_S = _heated(adjusted_SV, inputs.temperature == 0.0, inputs)
        return jnp.where(x_SV >= lowest_S[:, None], x_SV, -jnp.inf)

    return jax.lax.cond(
        inputs.any_special, lambda: _in_blocks(of_block, logits_SV, inputs), lambda: logits_SV
    )


def logprobs(
    logits_SV: jax.Array,
    ids_S: jax.Array,
    num_top: int,
    wanted: jax.Array,
    *,
    is_normalised: bool = True,
) -> Logprobs:
    """Log-probabilities by logits, or the logits themselves; zeros unless `wanted`."""
    num_seqs = logits_SV.shape[0]

    def compute(logits_SV: jax.Array, ids_S: jax.Array) -> Logprobs:
        logp_SV = log_softmax_rows(logits_SV) if is_normalised else logits_SV
        chosen_S = _chosen(logp_SV, ids_S)
        rank_S = jnp.sum(logp_SV > chosen_S[:, None], axis=-1, dtype=jnp.int32) + 1
        top_values, top_ids = top_k_rows(logp_SV, num_top)
        return Logprobs(chosen_S, rank_S, top_ids, top_values)

    def skip() -> Logprobs:
        return Logprobs(
            jnp.zeros((num_seqs,), jnp.float32),
            jnp.zeros((num_seqs,), jnp.int32),
            jnp.zeros((num_seqs, num_top), jnp.int32),
            jnp.zeros((num_seqs, num_top), jnp.float32),
        )

    return jax.lax.cond(wanted, lambda: _in_blocks(compute, logits_SV, ids_S), skip)


def chosen_logprobs(logits_SV: jax.Array, ids_S: jax.Array) -> jax.Array:
    """f32[S]: raw log-probabilities of these tokens, as `logprobs` gives them."""
    return _chosen(log_softmax_rows(logits_SV), ids_S)


def _chosen(logp_SV: jax.Array, ids_S: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logp_SV, ids_S[:, None], axis=1)[:, 0]


def count_sampled(
    rows: RowState, inputs: SamplingInputs, ids_S: jax.Array, samples_S: jax.Array
) -> RowState:
    """The row state after this step: newest tokens, and counts where penalties are used. Consumes
    `rows`.
    """
    nobody = rows.last_token.shape[0]
    row_S = jnp.where(samples_S, inputs.rows, nobody)
    counted_S = jnp.where(samples_S, inputs.adjusted_rows, nobody)
    return dataclasses.replace(
        rows,
        last_token=rows.last_token.at[row_S].set(ids_S, mode="drop"),
        output_counts=rows.output_counts.at[counted_S, ids_S].add(1, mode="drop"),
    )


def top_k_threshold(x_SV: jax.Array, k_S: jax.Array) -> jax.Array:
    """f32[S]: the k-th largest value of each row, so that `x >= threshold` keeps k entries and all
    ties.
    """

    def enough(key_S: jax.Array, keys_SV: jax.Array) -> jax.Array:
        return jnp.sum(keys_SV >= key_S[:, None], axis=-1, dtype=jnp.int32) >= k_S

    return _largest_threshold(x_SV, enough)


def top_p_threshold(x_SV: jax.Array, p_S: jax.Array) -> jax.Array:
    """f32[S]: the largest value t with `sum(softmax(x)[x >= t]) >= p`: the nucleus, with all ties
    of its last entry.
    """
    probs_SV = jax.nn.softmax(x_SV, axis=-1)

    def enough(key_S: jax.Array, keys_SV: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(keys_SV >= key_S[:, None], probs_SV, 0.0), axis=-1) >= p_S

    return _largest_threshold(x_SV, enough)


def _sample_special(
    logits_SV: jax.Array, rows: RowState, inputs: SamplingInputs, process: Process | None
) -> jax.Array:
    """Token ids; -1 where what processors made of the logits has no finite maximum."""
    adjusted_SV = _adjusted(logits_SV, rows, inputs, process)
    greedy_S = inputs.temperature == 0.0
    best_S = argmax_rows(adjusted_SV)
    x_SV, lowest_S = _heated(adjusted_SV, greedy_S, inputs)
    noisy_SV = x_SV + _gumbel(inputs, x_SV.shape[1])
    drawn_S = argmax_rows(jnp.where(x_SV >= lowest_S[:, None], noisy_SV, -jnp.inf))
    ids_S = jnp.where(greedy_S, best_S, drawn_S)
    if process is None:
        return ids_S
    peak_S = jnp.take_along_axis(adjusted_SV, best_S[:, None], axis=1)[:, 0]  # NaN is one, too
    return jnp.where(jnp.isfinite(peak_S), ids_S, -1)


def _adjusted(
    logits_SV: jax.Array, rows: RowState, inputs: SamplingInputs, process: Process | None
) -> jax.Array:
    return jax.lax.cond(
        inputs.any_adjusted, lambda: _adjust(logits_SV, rows, inputs, process), lambda: logits_SV
    )


def _heated(
    x_SV: jax.Array, greedy_S: jax.Array, inputs: SamplingInputs
) -> tuple[jax.Array, jax.Array]:
    """(logits by temperature, the least value kept in each row)."""
    x_SV = x_SV / jnp.where(greedy_S, 1.0, inputs.temperature)[:, None]
    # A threshold, not the cut rows: those would be copied where nothing is cut.
    lowest_S = jax.lax.cond(
        inputs.any_truncated,
        lambda: _lowest_kept(x_SV, inputs),
        lambda: jnp.full_like(inputs.temperature, -jnp.inf),
    )
    return x_SV, lowest_S


def _in_blocks(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, rows by rows: what it makes of [S, V] floats in between would otherwise be
    reserved for all sequences at once, 150 MB each for 256 of a large vocabulary. Scalars belong to
    all rows.
    """
    leaves, structure = jax.tree.flatten(args)
    num_rows = leaves[0].shape[0]
    if num_rows <= ROWS_AT_ONCE or num_rows % ROWS_AT_ONCE:
        return function(*args)

    def of_block(i: jax.Array) -> tuple[jax.Array, Any]:
        # Rows are gathered: a GPU copies slices at an offset that is data outside of any graph.
        row_B = i * ROWS_AT_ONCE + jnp.arange(ROWS_AT_ONCE, dtype=jnp.int32)
        block = [leaf.at[row_B].get(mode="clip") if leaf.ndim else leaf for leaf in leaves]
        return row_B, function(*jax.tree.unflatten(structure, block))

    def run(i: jax.Array, results: Any) -> Any:
        row_B, of_rows = of_block(i)
        return jax.tree.map(lambda all_, part: all_.at[row_B].set(part), results, of_rows)

    shapes = jax.eval_shape(of_block, jnp.int32(0))[1]
    results = jax.tree.map(lambda x: jnp.zeros((num_rows, *x.shape[1:]), x.dtype), shapes)
    return jax.lax.fori_loop(0, num_rows // ROWS_AT_ONCE, run, results)


def _adjust(
    logits_SV: jax.Array, rows: RowState, inputs: SamplingInputs, process: Process | None
) -> jax.Array:
    num_seqs = logits_SV.shape[0]
    is_adjusted_S1 = (inputs.adjusted_rows < rows.bias.shape[0])[:, None]

    def of_row(table: jax.Array) -> jax.Array:
        return table.at[inputs.adjusted_rows].get(mode="clip")

    is_out_SV = inputs.masked[:, None] & ~_bits(inputs.masks, logits_SV.shape[1])
    x_SV = jnp.where(is_out_SV, -jnp.inf, logits_SV)
    x_SV = x_SV + jnp.where(is_adjusted_S1, of_row(rows.bias), 0.0)
    sequences = jnp.arange(num_seqs, dtype=jnp.int32)[:, None]
    x_SV = x_SV.at[sequences, inputs.banned].set(-jnp.inf, mode="drop")

    counts_SV = jnp.where(is_adjusted_S1, of_row(rows.output_counts), 0)
    prompt_SV = is_adjusted_S1 & of_row(rows.prompt_mask)
    if process is not None:
        x_SV = process(x_SV, inputs, counts_SV, prompt_SV)
    seen_SV = prompt_SV | (counts_SV > 0)
    factor_S1 = inputs.repetition[:, None]
    repeated_SV = jnp.where(x_SV > 0, x_SV / factor_S1, x_SV * factor_S1)
    x_SV = jnp.where(seen_SV, repeated_SV, x_SV)
    x_SV = x_SV - inputs.frequency[:, None] * counts_SV.astype(jnp.float32)
    return x_SV - inputs.presence[:, None] * (counts_SV > 0).astype(jnp.float32)


def _bits(words_SW: jax.Array, num_bits: int) -> jax.Array:
    """bool[S, num_bits]: bit v % 32 of word v // 32."""
    bits_SWB = (words_SW[:, :, None] >> jnp.arange(32, dtype=jnp.int32)[None, None, :]) & 1
    return bits_SWB.reshape(words_SW.shape[0], -1)[:, :num_bits] != 0


def _lowest_kept(x_SV: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """f32[S]: the least value that min_p, then top_k, then top_p leave in each row."""
    floor_S = jnp.max(x_SV, axis=-1) + jnp.log(inputs.min_p)  # log(0) = -inf keeps all
    x_SV = jnp.where(x_SV >= floor_S[:, None], x_SV, -jnp.inf)
    vocab_size = x_SV.shape[1]
    k_S = jnp.where(inputs.top_k == 0, vocab_size, jnp.minimum(inputs.top_k, vocab_size))
    kth_S = top_k_threshold(x_SV, k_S)
    x_SV = jnp.where(x_SV >= kth_S[:, None], x_SV, -jnp.inf)
    # Rounding may leave the whole row's sum just under 1, so p = 1 must bypass the search.
    t_S = jnp.where(inputs.top_p < 1.0, top_p_threshold(x_SV, inputs.top_p), -jnp.inf)
    return jnp.maximum(jnp.maximum(floor_S, kth_S), t_S)


def _gumbel(inputs: SamplingInputs, vocab_size: int) -> jax.Array:
    def row(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)
        return jax.random.gumbel(key, (vocab_size,), jnp.float32)

    return jax.vmap(row)(inputs.seeds, inputs.positions)


def _largest_threshold(
    x_SV: jax.Array, enough: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """Largest float t of each row for which `enough(key_S, keys_SV)` holds, by bisection over the
    32 bits of ordered keys.

    32 counting passes cost less than one sort of a vocabulary, need no scratch, and sum in a fixed
    order.
    """
    keys_SV = _ordered_key(x_SV)
    low_S = jnp.zeros((x_SV.shape[0],), jnp.uint32)  # always enough

    def set_bit(i: jax.Array, low_S: jax.Array) -> jax.Array:
        candidate_S = low_S | (jnp.uint32(1) << (jnp.uint32(31) - i.astype(jnp.uint32)))
        return jnp.where(enough(candidate_S, keys_SV), candidate_S, low_S)

    return _value_of_key(jax.lax.fori_loop(0, 32, set_bit, low_S))


def _ordered_key(x: jax.Array) -> jax.Array:
    """uint32 keys in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(x + 0.0, jnp.uint32)  # + 0.0 turns -0 into +0
    sign = jnp.uint32(0x80000000)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _value_of_key(key: jax.Array) -> jax.Array:
    sign = jnp.uint32(0x80000000)
    bits = jnp.where(key >= sign, key ^ sign, ~key)
    value = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(jnp.isnan(value), -jnp.inf, value)  # keys below that of -inf
