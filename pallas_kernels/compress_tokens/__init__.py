from jengine.pallas_kernels.compress_tokens.api import (
    Pieces,
    compress_tokens,
    cut_into_pieces,
    state_size,
)

__all__ = ["Pieces", "compress_tokens", "cut_into_pieces", "state_size"]
