"""Experts in slots: their places are data, so that they can be moved between steps and the busiest
be there several times (`sharding/expert_balance.py` decides).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx


@dataclass(frozen=True)
class ExpertSlots:
    """Of one layer."""

    num_slots: int  # of all ranks
    max_replicas: int  # slots of one expert


class SlotTable(nnx.Variable):
    """i32[E, 1 + R]: in how many slots each expert is, then in which. No parameter: no checkpoint
    has it.
    """


class SlotLoad(nnx.Variable):
    """i32[P]: tokens that chose each slot. It arises while a step is traced."""


def slot_table(num_experts: int, slots: ExpertSlots) -> SlotTable:
    """A table whose value is to come."""
    shape = (num_experts, 1 + slots.max_replicas)
    return SlotTable(jax.ShapeDtypeStruct(shape, jnp.dtype("int32")))


def choose_slots(ids_Tk: jax.Array, table_ER: jax.Array, x_TD: jax.Array) -> jax.Array:
    """i32[T, k]: a slot of each token's experts. Which of several is drawn from the token's own
    hidden state, so that it does not depend on the batch.
    """
    entries_TkR = table_ER.at[ids_Tk].get(mode="clip")
    bits_T4 = jax.lax.bitcast_convert_type(x_TD[:, :4].astype(jnp.float32), jnp.uint32)
    hash_T1 = jnp.zeros((ids_Tk.shape[0], 1), jnp.uint32)
    for i in range(bits_T4.shape[1]):
        hash_T1 = _mixed(hash_T1 ^ bits_T4[:, i : i + 1])
    hash_Tk = _mixed(hash_T1 + ids_Tk.astype(jnp.uint32))
    # A token without a hidden state (padding) may have none at all.
    replicas_Tk = jnp.maximum(entries_TkR[..., 0], 1).astype(jnp.uint32)
    which_Tk = (hash_Tk % replicas_Tk).astype(jnp.int32)
    return jnp.take_along_axis(entries_TkR[..., 1:], which_Tk[..., None], axis=2)[..., 0]


def count_slots(slots_Tk: jax.Array, num_tokens: jax.Array, num_slots: int) -> SlotLoad:
    is_real_T1 = jnp.arange(slots_Tk.shape[0], dtype=jnp.int32)[:, None] < num_tokens
    counted_Tk = jnp.where(is_real_T1, slots_Tk, num_slots)
    zeros_P = jnp.zeros(num_slots, jnp.int32)
    return SlotLoad(zeros_P.at[counted_Tk].add(1, mode="drop"))


def _mixed(bits: jax.Array) -> jax.Array:
    """Every bit depends on every bit (the 32-bit finaliser of MurmurHash3)."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
