"""Users' logits processors inside the step, and what tells their programs apart."""

import hashlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jengine.layers.sampling import Process, SamplingInputs
from jengine.logits_processors import LogitsContext, LogitsProcessor, Parameter

_DTYPES = {"float32": jnp.float32, "int32": jnp.int32, "bool": jnp.bool_}


def build_process(processors: Sequence[LogitsProcessor]) -> Process | None:
    """All of them in order; None if there are none. Tokens that are ruled out stay so, and rows
    that a processor does not act on keep their bits.
    """
    if not processors:
        return None

    def process(
        logits_SV: jax.Array, inputs: SamplingInputs, counts_SV: jax.Array, prompt_SV: jax.Array
    ) -> jax.Array:
        assert inputs.extra is not None
        first = 0
        for processor in processors:
            words_SE = inputs.extra[:, first : first + processor.info.num_words]
            first += processor.info.num_words
            is_active_S = words_SE[:, 0] != 0
            params = _params(words_SE[:, 1:], processor.info.parameters)
            context = LogitsContext(params, is_active_S, inputs.positions, counts_SV, prompt_SV)
            new_SV = processor.function(logits_SV, context)
            is_changed_SV = is_active_S[:, None] & (logits_SV != -jnp.inf)
            logits_SV = jnp.where(is_changed_SV, new_SV, logits_SV)
        return logits_SV

    return process


def check_processors(processors: Sequence[LogitsProcessor], vocab_size: int) -> list[str]:
    """A digest of what each compiles to. Raises `ValueError` for one that fails, or returns
    something else than logits.

    Digests are of lowered programs: they see what a function calls and closes over, as a digest of
    its source would not.
    """
    return [_check(processor, vocab_size) for processor in processors]


def _check(processor: LogitsProcessor, vocab_size: int) -> str:
    name = processor.info.name
    num_seqs = 4
    logits = jax.ShapeDtypeStruct((num_seqs, vocab_size), jnp.float32)
    words = jax.ShapeDtypeStruct((num_seqs, processor.info.num_words), jnp.int32)
    of_seq = jax.ShapeDtypeStruct((num_seqs,), jnp.int32)
    counts = jax.ShapeDtypeStruct(logits.shape, jnp.int32)
    mask = jax.ShapeDtypeStruct(logits.shape, jnp.bool_)

    def run(
        logits_SV: jax.Array,
        words_SE: jax.Array,
        positions_S: jax.Array,
        counts_SV: jax.Array,
        prompt_SV: jax.Array,
    ) -> jax.Array:
        params = _params(words_SE[:, 1:], processor.info.parameters)
        is_active_S = words_SE[:, 0] != 0
        context = LogitsContext(params, is_active_S, positions_S, counts_SV, prompt_SV)
        return processor.function(logits_SV, context)

    try:
        lowered = jax.jit(run).lower(logits, words, of_seq, counts, mask)
    except (TypeError, ValueError, LookupError, AttributeError, NameError) as error:
        raise ValueError(
            f"logits_processors: {name} fails: {type(error).__name__}: {error}"
        ) from error
    got = [f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(lowered.out_info)]
    wanted = f"float32{list(logits.shape)}"
    if got != [wanted]:
        found = ", ".join(got) or "nothing"
        raise ValueError(f"logits_processors: {name} returns {found} instead of {wanted}")
    return hashlib.sha256(lowered.as_text().encode()).hexdigest()


def _params(words_SE: jax.Array, parameters: dict[str, Parameter]) -> dict[str, jax.Array]:
    params: dict[str, jax.Array] = {}
    first = 0
    for name, parameter in parameters.items():
        words = words_SE[:, first : first + parameter.num_words]
        first += parameter.num_words
        values = words != 0
        if parameter.dtype != "bool":
            values = jax.lax.bitcast_convert_type(words, _DTYPES[parameter.dtype])
        params[name] = values.reshape(words_SE.shape[0], *parameter.shape)
    return params
