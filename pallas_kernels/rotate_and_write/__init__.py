from jengine.pallas_kernels.rotate_and_write.api import rotate_and_write

__all__ = ["rotate_and_write"]
