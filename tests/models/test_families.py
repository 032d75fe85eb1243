"""Every dense family against Hugging Face transformers in float32: whole, in chunks, token by token
through the paged step, with the same bits however it is cut; and each of its parameters is seen to
matter.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jengine.kv_spec import build_groups
from jengine.layers.param import abstract_parameters
from jengine.models.registry import resolve_architecture
from jengine.runtime.forward import build_forward
from jengine.runtime.step import StepSpec, build_score
from tests.oracles.driver import Driver

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.models.families import (  # imports both
    CASES,
    CHUNKS,
    TOKENS,
    TOLERANCE,
    build,
    errors,
    expected_logits,
    permuted,
)

# XLA:CPU of JAX 0.10 makes fused multiply-adds across the barrier in `layers.linear.scaled`.
FUSED_ON_OLD_JAX = ("granite",)


@pytest.mark.parametrize("name", CASES)
def test_logits_match_transformers(name: str, tmp_path: Path) -> None:
    hf_model, driver = build(CASES[name], tmp_path)
    assert len(driver.runner.groups) == CASES[name].groups
    expected = expected_logits(hf_model)
    assert max(errors(driver, expected)) <= TOLERANCE
    if name not in FUSED_ON_OLD_JAX or jax.__version_info__ >= (0, 11):
        assert not changed_bits(driver)
    # The comparison can fail: the same oracle with any one weight permuted is another model.
    got = driver.logits(TOKENS, [len(TOKENS)])
    unseen = [n for n, e in permuted(hf_model) if np.abs(got - e).max() <= 10 * TOLERANCE]
    assert not unseen
    check_bfloat16(driver.loaded.checkpoint.hf_config)


def changed_bits(driver: Driver) -> list[list[int]]:
    """The cuts of the text that give a hidden state other bits."""
    driver.logits(TOKENS, CHUNKS[0])
    whole, changed = driver.hidden, []
    for chunks in CHUNKS[1:]:
        driver.logits(TOKENS, chunks)
        if not np.array_equal(driver.hidden, whole):
            changed.append(chunks)
    return changed


def check_bfloat16(hf_config: dict) -> None:
    """In bfloat16 nothing is promoted: hidden states stay what they are, logits are float32."""
    _, model_class = resolve_architecture(hf_config)
    cfg = model_class.config_class.from_hf(
        hf_config, dtype="bfloat16", kv_dtype="bfloat16", max_model_len=64
    )
    module = model_class(cfg)
    graphdef, state = nnx.split(module)
    groups = build_groups(model_class.kv_specs(cfg), 16)
    spec = StepSpec(graphdef, jax.tree.structure((state,)), groups, 0, keeps_logits=False)
    leaves = tuple(
        jax.ShapeDtypeStruct(p.shape, jnp.dtype(p.dtype))
        for p in abstract_parameters(module).values()
    )
    ids = jax.ShapeDtypeStruct((16,), jnp.int32)
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32)
    hidden = jax.eval_shape(build_forward(spec), leaves, ids, lengths)
    _, logits = jax.eval_shape(build_score(spec), leaves, hidden, ids)
    assert (hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("name", ["gemma2", "granite"])  # a soft cap, a scale
def test_prompt_logits_and_forward_are_scaled_too(name: str, tmp_path: Path) -> None:
    hf_model, driver = build(CASES[name], tmp_path)
    expected = expected_logits(hf_model)
    runner, ids = driver.runner, jnp.asarray(TOKENS, jnp.int32)
    hidden = jax.jit(build_forward(runner.spec))(runner.leaves, ids, jnp.array([len(TOKENS)]))
    _, scored = jax.jit(build_score(runner.spec))(runner.leaves, hidden, ids)
    assert np.abs(np.asarray(scored) - expected).max() <= TOLERANCE
    live = runner.model.logits(hidden, jnp.int32(len(TOKENS)))
    assert np.abs(np.asarray(live) - expected).max() <= TOLERANCE
