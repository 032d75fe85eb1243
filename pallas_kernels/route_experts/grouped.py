"""DeepSeek's way to choose experts."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class GroupedRouting:
    """DeepSeek's choice of experts: those of the few best groups only (arXiv:2405.04434)."""

    scoring: Literal["softmax", "sigmoid", "sqrtsoftplus"]
    num_groups: int = 1
    top_groups: int = 1
    scale: float = 1.0  # of the weights, in the end
    has_bias: bool = False  # added to the scores for the choice, not for the weights
