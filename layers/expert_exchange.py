"""How tokens of several data ranks come to the ranks that hold their experts, and the results back.

Two ways, which give the same sums. One gathers everything everywhere and scatters the sums; the
other sends each token to those ranks only that hold its experts. Neither drops a token, whatever
the router does.
"""

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from jengine.pallas_kernels.linear.reference import sum_of_parts
from jengine.sharding import collectives

Exchange = Literal["auto", "allgather_reducescatter", "padded_all_to_all"]
# Of tokens, ids of places and weights, all rows valid: summands [P, T, D] of a rank's experts.
OfExperts = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

# The padded exchange has to save half of the rows. It makes as many calls as gathering (three ways
# there, one back), but must first agree on rounds and sort its rows by destination.
MAX_SHARE = 0.5
# Rows of a destination over what an even router sends there: by this factor, and this many standard
# deviations of so many independent tokens. What is left takes another round.
SLACK, DEVIATIONS = 1.25, 4.0


def capacity(num_tokens: int, top_k: int, num_ranks: int) -> int:
    """Rows that a rank sends to each rank in a round, of its own `num_tokens`."""
    share = 1.0 - (1.0 - 1.0 / num_ranks) ** top_k  # of tokens that a rank has an expert for
    rows = SLACK * num_tokens * share
    rows += DEVIATIONS * math.sqrt(num_tokens * share * (1.0 - share))
    return min(num_tokens, -(-math.ceil(rows) // 8) * 8)


def choose_exchange(exchange: Exchange, num_tokens: int, top_k: int, num_ranks: int) -> Exchange:
    """By what travels: gathering brings every rank all rows of all others, the padded exchange
    `capacity` of each. With 8 ranks and 8 experts a token that is nearly all of them, with 32 ranks
    and 6 experts a third; of few tokens a rank's share varies too much to be worth a limit.
    """
    if exchange != "auto":
        return exchange
    is_worth_it = capacity(num_tokens, top_k, num_ranks) <= MAX_SHARE * num_tokens
    return "padded_all_to_all" if is_worth_it else "allgather_reducescatter"


def gather_and_scatter(
    x_TD: jax.Array, places_Tk: jax.Array, weights_Tk: jax.Array, of_experts: OfExperts
) -> jax.Array:
    """[1, T, D]: what all data ranks' experts add to this one's tokens."""
    gathered = [collectives.gather_over(x, "tokens", 0) for x in (x_TD, places_Tk, weights_Tk)]
    return collectives.scatter_over(_one_part(of_experts(*gathered), x_TD.dtype), "tokens")[None]


def send_and_return(
    x_TD: jax.Array,
    places_Tk: jax.Array,
    weights_Tk: jax.Array,
    of_experts: OfExperts,
    *,
    num_places: int,
    num_local: int,
    capacity: int,
) -> jax.Array:
    """The same. Each rank sends the tokens that have an expert there, in rounds of consecutive
    tokens of which no rank gets more than `capacity`: one round, unless the load is uneven.

    All experts of a token are in one round, and their results are added in the order of its
    choices, in float32: a row's bits depend neither on the others nor on the rounds.
    """
    T, D = x_TD.shape
    R, C = collectives.ways_of("tokens"), capacity
    rank_Tk = _data_rank(places_Tk, num_places, num_local, R)
    ranks_R = jnp.arange(R, dtype=jnp.int32)
    is_sent_TR = (rank_Tk[:, :, None] == ranks_R[None, None]).any(axis=1)
    before_UR = jnp.pad(jnp.cumsum(is_sent_TR, axis=0, dtype=jnp.int32), ((1, 0), (0, 0)))
    bounds_B, num_rounds = _rounds(before_UR, C)
    token_T = jnp.arange(T, dtype=jnp.int32)

    def one_round(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        i, sum_TD = carry
        start, stop = bounds_B[i], bounds_B[i + 1]
        is_now_T1 = ((token_T >= start) & (token_T < stop))[:, None]
        row_TR = before_UR[:-1] - before_UR[start][None] + C * ranks_R[None]
        row_TR = jnp.where(is_sent_TR & is_now_T1, row_TR, R * C)
        tokens_TR = jnp.broadcast_to(token_T[:, None], row_TR.shape)
        token_M = jnp.full(R * C, T, jnp.int32).at[row_TR].set(tokens_TR, mode="drop")
        x_MD, places_Mk, weights_Mk = (
            _send(x.at[token_M].get(mode="fill", fill_value=fill), R)
            for x, fill in ((x_TD, 0), (places_Tk, num_places), (weights_Tk, 0))
        )
        result_MD = _send(_one_part(of_experts(x_MD, places_Mk, weights_Mk), x_TD.dtype), R)
        # A rank answers once for all experts that it has of a token.
        for j in range(rank_Tk.shape[1]):
            rank_T = rank_Tk[:, j]
            is_new_T = (rank_T[:, None] != rank_Tk[:, :j]).all(axis=1)
            own_T = jnp.take_along_axis(row_TR, jnp.clip(rank_T, 0, R - 1)[:, None], axis=1)[:, 0]
            own_T = jnp.where(is_new_T & (rank_T < R), own_T, R * C)
            added_TD = result_MD.at[own_T].get(mode="fill", fill_value=0)
            sum_TD = sum_TD + added_TD.astype(jnp.float32)
        return i + 1, sum_TD

    first = jnp.int32(0), jnp.zeros((T, D), jnp.float32)
    _, sum_TD = jax.lax.while_loop(lambda carry: carry[0] < num_rounds, one_round, first)
    sent = [
        jax.ShapeDtypeStruct((R * C, x.shape[1]), x.dtype) for x in (x_TD, places_Tk, weights_Tk)
    ]
    return sum_TD.astype(_travel_dtype(jax.eval_shape(of_experts, *sent), x_TD.dtype))[None]


def _data_rank(places_Tk: jax.Array, num_places: int, num_local: int, num_ranks: int) -> jax.Array:
    """i32[T, k]: to which data rank a choice goes from here; past the last for one of nobody, or of
    ranks that have this one's tokens: those send it.
    """
    siblings = collectives.ways("experts")  # ranks of the same tokens, which share the experts out
    rank_Tk = places_Tk // num_local
    is_ours_Tk = rank_Tk % siblings == collectives.rank_in("experts") % siblings
    return jnp.where((places_Tk < num_places) & is_ours_Tk, rank_Tk // siblings, num_ranks)


def _rounds(before_UR: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """(first token of each round, one past the last round's; rounds of the rank that has most).

    A token takes one row of a rank at most, so a round has `capacity` tokens at least.
    """
    num_tokens = before_UR.shape[0] - 1
    bounds = [jnp.int32(0)]
    num_rounds = jnp.int32(0)
    for _ in range(-(-num_tokens // capacity)):
        rows_UR = before_UR - before_UR[bounds[-1]][None]
        num_rounds += (rows_UR[-1] > 0).any().astype(jnp.int32)
        fits_U = (rows_UR <= capacity).all(axis=1)
        bounds.append(fits_U.sum(dtype=jnp.int32) - 1)
    return jnp.stack(bounds), collectives.max_over(num_rounds, "tokens")


def _send(x_M: jax.Array, num_ranks: int) -> jax.Array:
    """Rows by the rank they go to -> rows by the rank they come from."""
    rows = x_M.reshape(num_ranks, -1, *x_M.shape[1:])
    return collectives.exchange_over(rows, "tokens").reshape(x_M.shape)


def _one_part(parts_PTD: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return sum_of_parts(parts_PTD, _travel_dtype(parts_PTD, dtype))


def _travel_dtype(parts_PTD: jax.Array | jax.ShapeDtypeStruct, dtype: jnp.dtype) -> jnp.dtype:
    """As in `sum_of_ranks`: several summands are float32, and stay so."""
    return dtype if parts_PTD.shape[0] == 1 else jnp.dtype("float32")
