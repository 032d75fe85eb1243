"""Both exchanges of tokens between data ranks, over fake devices of one CPU: bytes that travel and
time of one layer of experts.

    python -m benchmarks.expert_exchange [--ranks 8]

Fake devices copy through shared memory and share the cores, so that the time shows what is computed
and copied on the way (a padded exchange computes nothing for padding), not what a network costs.
"""

import argparse
import dataclasses
import statistics
import time
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jengine.layers.expert_exchange import Exchange, capacity, choose_exchange
from jengine.layers.moe import MoEConfig, SparseMLP
from jengine.layers.param import abstract_parameters
from jengine.sharding.placement import Placement
from jengine.sharding.split import Split

DIM, WIDTH, NUM_EXPERTS = 1024, 128, 64
REPEATS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=8)
    num_ranks = parser.parse_args().ranks
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", num_ranks)
    gather, padded = get_args(Exchange)[1:]
    print("tokens a rank, experts a token | rows sent | gather ms | padded ms | rule")
    for top_k in (1, 2, 8):
        for num_tokens in (16, 128, 512):
            rows = capacity(num_tokens, top_k, num_ranks) / num_tokens
            times = [layer_ms(num_ranks, num_tokens, top_k, each) for each in (gather, padded)]
            rule = choose_exchange("auto", num_tokens, top_k, num_ranks)
            figures = f"{rows:4.2f} | {times[0]:8.2f} | {times[1]:8.2f}"
            print(f"{num_tokens:5} {top_k:2} | {figures} | {rule}")


def layer_ms(num_ranks: int, num_tokens: int, top_k: int, exchange: Exchange) -> float:
    """Median time of a layer."""
    split = Split(data=num_ranks)
    placement = Placement(split, tuple(jax.devices()[:num_ranks]))
    moe = MoEConfig(NUM_EXPERTS, top_k, WIDTH, norm_topk_prob=True).of_rank(split)
    module = SparseMLP(DIM, dataclasses.replace(moe, exchange=exchange), "bfloat16")
    graphdef, state = nnx.split(module)
    rng = np.random.default_rng(0)

    def draw(shape: tuple[int, ...]) -> jax.Array:
        values = rng.normal(size=shape, scale=DIM**-0.5)
        return jnp.asarray(values, jnp.bfloat16)

    leaves = tuple(
        # Every rank its own experts, and the same router.
        jax.device_put(draw((num_ranks * info.shape[0], *info.shape[1:])), placement.per_data_rank)
        if info.logical_axes[0] == "experts"
        else jax.device_put(draw(info.shape), placement.replicated)
        for info in abstract_parameters(module).values()
    )
    x_TD = jax.device_put(draw((num_ranks * num_tokens, DIM)), placement.per_data_rank)

    def layer(leaves: tuple[jax.Array, ...], x_TD: jax.Array) -> jax.Array:
        merged = nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), leaves))
        return merged.parts(x_TD, jnp.int32(x_TD.shape[0]))[0]

    program = jax.jit(placement.on_ranks(layer, (leaves, x_TD), x_TD))
    seconds = []
    for _ in range(REPEATS + 2):
        started = time.perf_counter()
        jax.block_until_ready(program(leaves, x_TD))
        seconds.append(time.perf_counter() - started)
    return 1e3 * statistics.median(seconds[2:])


if __name__ == "__main__":
    main()
