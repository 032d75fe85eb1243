"""The choice of experts from a router's scores."""

from jengine.pallas_kernels.route_experts.api import GroupedRouting, route, route_grouped

__all__ = ["GroupedRouting", "route", "route_grouped"]
