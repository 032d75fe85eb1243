from jengine.pallas_kernels.kv_write.api import is_in_place, kv_write

__all__ = ["is_in_place", "kv_write"]
