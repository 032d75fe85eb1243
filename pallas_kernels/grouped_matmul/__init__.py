"""Matmuls of tokens with the weights of the expert that each was routed to."""

from jengine.pallas_kernels.grouped_matmul.api import expert_parts

__all__ = ["expert_parts"]
