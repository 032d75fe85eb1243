"""Options are a function of the platform, and XLA takes them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from jengine.runtime.xla_options import compiler_options, measuring_options, tuning_cache
from tests.oracles import h100


def test_a_cpu_gets_none(tmp_path: Path) -> None:
    assert compiler_options("cpu") == measuring_options("cpu") == {}
    assert tuning_cache("cpu", tmp_path) == tuning_cache("gpu", None) == {}


def test_both_names_of_a_gpu_mean_the_same() -> None:
    assert compiler_options("gpu") == compiler_options("cuda")
    assert "WHILE" in str(compiler_options("gpu")["xla_gpu_enable_command_buffer"]).split(",")
    assert measuring_options("gpu").items() > compiler_options("gpu").items()


def test_the_user_s_flags_win() -> None:
    flags = "--xla_gpu_enable_command_buffer= --xla_dump_to=/x"
    assert "xla_gpu_enable_command_buffer" not in compiler_options("gpu", flags)
    assert "xla_gpu_graph_min_graph_size" in compiler_options("gpu", flags)


@h100.needs_compiler
def test_xla_knows_every_option(tmp_path: Path) -> None:
    arguments = jax.ShapeDtypeStruct(
        (8, 128), jnp.bfloat16, sharding=SingleDeviceSharding(h100._device())
    )
    lowered = jax.jit(lambda x: x @ x.T).lower(arguments)
    options = measuring_options("gpu") | tuning_cache("gpu", tmp_path)
    lowered.compile(compiler_options=dict(options))
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        lowered.compile(compiler_options={**options, "xla_gpu_nothing_such": 1})
