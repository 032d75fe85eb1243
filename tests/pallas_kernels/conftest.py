"""Back ends of each operation as test parameters."""

import importlib
from types import ModuleType

import pytest

from jengine.pallas_kernels import native


@pytest.fixture(params=["reference", "cpu_ffi"])
def backend(request: pytest.FixtureRequest) -> ModuleType:
    """The module of one back end of the operation named by the test module's `OPERATION`."""
    if request.param == "cpu_ffi" and not native.is_available():
        pytest.skip(f"no C++ library: {native.status().reason}")
    return importlib.import_module(
        f"jengine.pallas_kernels.{request.module.OPERATION}.{request.param}"
    )
