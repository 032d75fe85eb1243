"""The gated delta rule and the short convolution against float64, with NaN in all that must not be
read; that nothing else is written; and that a row's bits do not depend on its neighbours.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jengine.pallas_kernels.gated_delta import reference, xla_gpu
from jengine.pallas_kernels.gated_delta.cases import CASES, Case, Inputs
from jengine.pallas_kernels.platform import tracing_for

EPS = 2.0**-23


@functools.cache
def jitted_delta(
    backend: ModuleType, is_decode: bool
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """One function object for each back end: traces are kept by it."""
    return jax.jit(functools.partial(backend.gated_delta, is_decode=is_decode), donate_argnums=5)


jitted_conv = jax.jit(reference.short_conv, donate_argnums=2)


def run_delta(
    inputs: Inputs, is_decode: bool = False, backend: ModuleType = reference
) -> tuple[np.ndarray, ...]:
    names = ("q_TKH", "k_TKH", "v_TNV", "log_decay_TN", "beta_TN", "states_PE", "slots_2S",
             "cu_q_lens_S1")  # fmt: skip
    args = [jnp.asarray(getattr(inputs, name)) for name in names]
    with tracing_for("cuda" if backend is xla_gpu else "cpu"):
        return tuple(map(np.asarray, jitted_delta(backend, is_decode)(*args)))


def run_conv(inputs: Inputs) -> tuple[np.ndarray, ...]:
    names = ("x_TC", "weight_CW", "states_PE", "slots_2S", "seq_ids_T", "cu_q_lens_S1")
    args = [jnp.asarray(getattr(inputs, name)) for name in names]
    return tuple(map(np.asarray, jitted_conv(*args)))


def delta_float64(case: Case, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """One token, one head at a time. Returns (out, states)."""
    H, V, share = case.key_dim, case.value_dim, case.value_heads // case.key_heads
    matrices = case.value_heads * H * V
    out = np.zeros(inputs.v_TNV.shape)
    states = inputs.states_PE.astype(np.float64)
    for s in range(len(case.lens)):
        read, write = inputs.slots_2S[:, s]
        state = states[read, :matrices] if read >= 0 else np.zeros(matrices)
        state = state.reshape(-1, H, V).copy()
        for t in range(inputs.cu_q_lens_S1[s], inputs.cu_q_lens_S1[s + 1]):
            for n in range(case.value_heads):
                q, k = (x[t, n // share].astype(np.float64) for x in (inputs.q_TKH, inputs.k_TKH))
                state[n] *= np.exp(np.float64(inputs.log_decay_TN[t, n]))
                written = np.float64(inputs.beta_TN[t, n]) * (inputs.v_TNV[t, n] - k @ state[n])
                state[n] += np.outer(k, written)
                out[t, n] = q @ state[n]
        states[write, :matrices] = state.reshape(-1)
    return out, states


def conv_float64(case: Case, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """From the whole input of each sequence, past and new."""
    W, C = case.width, case.channels
    out = np.zeros(inputs.x_TC.shape)
    states = inputs.states_PE.astype(np.float64)
    weight = inputs.weight_CW.astype(np.float64)
    for s in range(len(case.lens)):
        first, last = inputs.cu_q_lens_S1[s : s + 2]
        read, write = inputs.slots_2S[:, s]
        past = states[read, -(W - 1) * C :] if read >= 0 else np.zeros((W - 1) * C)
        x = np.concatenate([past.reshape(W - 1, C), inputs.x_TC[first:last]])
        for t in range(first, last):
            out[t] = (x[t - first : t - first + W] * weight.T).sum(axis=0)
        states[write, -(W - 1) * C :] = x[len(x) - (W - 1) :].reshape(-1)
    return out, states


@pytest.mark.parametrize("backend", [reference, xla_gpu], ids=["reference", "xla_gpu"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_delta_equals_float64(case: Case, backend: ModuleType) -> None:
    inputs, used = case.build(), case.num_tokens
    expected, states = delta_float64(case, inputs)
    for is_decode in {False, case.is_decode}:
        out, left = run_delta(inputs, is_decode, backend)
        # A token's out is a sum over its key and all tokens before it; a thousand roundings.
        tolerance = 1000 * EPS * np.abs(expected[:used]).max()
        assert np.abs(out[:used] - expected[:used]).max() <= tolerance
        assert np.isfinite(out).all()
        check_states(case, inputs, left, states, 1000 * EPS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_convolution_equals_float64(case: Case) -> None:
    inputs, used = case.build(), case.num_tokens
    expected, states = conv_float64(case, inputs)
    out, left = run_conv(inputs)
    assert np.abs(out[:used] - expected[:used]).max() <= 8 * EPS * np.abs(expected).max()
    assert np.isfinite(out).all()
    check_states(case, inputs, left, states, 0.0)


def check_states(
    case: Case, inputs: Inputs, left: np.ndarray, expected: np.ndarray, tolerance: float
) -> None:
    """Close where a state was left, the same bits everywhere else."""
    written = inputs.slots_2S[1, : len(case.lens)]
    scale = np.nanmax(np.abs(expected[written]))
    np.testing.assert_allclose(left[written], expected[written], rtol=0, atol=tolerance * scale)
    others = np.setdiff1d(np.arange(len(left)), written)
    np.testing.assert_array_equal(left[others], inputs.states_PE[others])


@pytest.mark.parametrize("length", [1, 2, 65, 150])
def test_bits_of_a_row_do_not_depend_on_neighbours(length: int) -> None:
    alone = Case(((length, True),), padding_tokens=0, padding_seqs=0)
    few = alone.build()
    many = Case(((3, False), (1, True), (70, True), (length, True), (1, False), (9, True)),
                padding_tokens=11, padding_seqs=5)  # fmt: skip
    inputs = many.build(seed=1)
    first = inputs.cu_q_lens_S1[3]
    mine = slice(first, first + length)
    for name in ("q_TKH", "k_TKH", "v_TNV", "log_decay_TN", "beta_TN", "x_TC"):
        getattr(inputs, name)[mine] = getattr(few, name)[:length]
    inputs.states_PE[inputs.slots_2S[0, 3]] = few.states_PE[few.slots_2S[0, 0]]
    few, inputs = replace(few), replace(inputs, weight_CW=few.weight_CW)
    alone_results = run_delta(few), run_conv(few)
    for (out, states), (got, left) in zip(
        alone_results, (run_delta(inputs), run_conv(inputs)), strict=True
    ):
        np.testing.assert_array_equal(got[mine], out)
        np.testing.assert_array_equal(left[inputs.slots_2S[1, 3]], states[few.slots_2S[1, 0]])
    if length == 1:
        np.testing.assert_array_equal(run_delta(few, True)[0], alone_results[0][0])


@pytest.mark.parametrize("cuts", [[150], [64, 86], [1] * 20 + [130], [3, 61, 1, 85]])
def test_cuts_change_nothing_but_roundings(cuts: list[int]) -> None:
    """The state goes from step to step, through the recurrence or the chunks."""
    case = Case(((sum(cuts), False),), padding_tokens=0, padding_seqs=0)
    whole = case.build()
    expected, _ = run_delta(whole)
    expected_conv, _ = run_conv(whole)
    states, outs, convs, start = whole.states_PE, [], [], 0
    for size in cuts:
        part = {
            name: getattr(whole, name)[start : start + size]
            for name in ("q_TKH", "k_TKH", "v_TNV", "log_decay_TN", "beta_TN", "x_TC", "seq_ids_T")
        }
        slots = np.array([[1 if start else -1], [1]], np.int32)
        cu = np.array([0, size], np.int32)
        step = replace(whole, states_PE=states, slots_2S=slots, cu_q_lens_S1=cu, **part)
        conv, states = run_conv(step)
        out, states = run_delta(replace(step, states_PE=states))
        outs.append(out)
        convs.append(conv)
        start += size
    np.testing.assert_array_equal(np.concatenate(convs), expected_conv)
    assert np.abs(np.concatenate(outs) - expected).max() <= 100 * EPS * np.abs(expected).max()


def test_states_are_updated_in_place() -> None:
    case = Case(((40, True), (1, True)), padding_tokens=0)
    inputs = case.build()
    states = jnp.zeros((512, inputs.states_PE.shape[1]))

    def both(states, i):
        _, states = reference.short_conv(
            i.x_TC, i.weight_CW, states, i.slots_2S, i.seq_ids_T, i.cu_q_lens_S1
        )
        return reference.gated_delta(
            i.q_TKH, i.k_TKH, i.v_TNV, i.log_decay_TN, i.beta_TN, states, i.slots_2S,
            i.cu_q_lens_S1,
        )  # fmt: skip

    fields = {name: jnp.asarray(getattr(inputs, name)) for name in Inputs.__dataclass_fields__}
    compiled = (
        jax.jit(lambda states, f: both(states, Inputs(**f)), donate_argnums=0)
        .lower(states, fields)
        .compile()
    )
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= states.nbytes
    assert memory.temp_size_in_bytes < states.nbytes / 4
