from jengine.pallas_kernels.argmax_rows.api import argmax_rows

__all__ = ["argmax_rows"]
