"""Runs every case of `rotate_and_write` through its Triton kernel on a CPU: `python -m` this."""

from tests.oracles.triton_interpreter import run_interpreted  # isort: skip  (before any kernel)

import jax

from jengine.pallas_kernels.platform import tracing_for
from jengine.pallas_kernels.rotate_and_write import triton_gpu
from jengine.pallas_kernels.rotate_and_write.cases import CASES
from jengine.pallas_kernels.triton_call import interpreted_by
from tests.pallas_kernels.test_rotate_and_write import check


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    with tracing_for("cuda"), interpreted_by(run_interpreted):
        for case in CASES:
            check(triton_gpu.rotate_and_write, case)
            print("ok", flush=True)


if __name__ == "__main__":
    main()
