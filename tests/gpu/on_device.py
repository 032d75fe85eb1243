"""Runs an operation's Triton kernels on this machine's GPU: `python -m` this, OPERATION.

A process of its own: a process has one back end, and the tests' is the CPU's.
"""

import importlib
import sys


def main(operation: str) -> None:
    backend = importlib.import_module(f"jengine.pallas_kernels.{operation}.triton_gpu")
    test = importlib.import_module(f"tests.pallas_kernels.test_{operation}")
    for case in dict.fromkeys((*test.INTERPRETED, *getattr(test, "ON_DEVICE", ()))):
        test.check(backend, case)
        print("ok", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
