"""Runs an operation's cases through its Triton kernels on a CPU: `python -m` this, OPERATION ...

A process of its own: Triton decides when it is imported whether it interprets.
"""

from tests.oracles.triton_interpreter import run_interpreted  # isort: skip  (before any kernel)

import importlib
import sys

import jax

from jengine.pallas_kernels.platform import tracing_for
from jengine.pallas_kernels.triton_call import interpreted_by


def main(*operations: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    for operation in operations:
        backend = importlib.import_module(f"jengine.pallas_kernels.{operation}.triton_gpu")
        test = importlib.import_module(f"tests.pallas_kernels.test_{operation}")
        print(operation)
        with tracing_for("cuda"), interpreted_by(run_interpreted):
            for case in test.INTERPRETED:
                test.check(backend, case)
                print("ok", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
