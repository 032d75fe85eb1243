from jengine.pallas_kernels.read_streams.api import read_streams

__all__ = ["read_streams"]
