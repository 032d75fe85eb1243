"""The C++ library of CPU kernels: built at first use, called through XLA's foreign function
interface.
"""

from jengine.pallas_kernels.native.loader import (
    NativeStatus,
    describe,
    fingerprint,
    is_available,
    require,
    status,
)

__all__ = ["NativeStatus", "describe", "fingerprint", "is_available", "require", "status"]
