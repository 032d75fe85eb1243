"""Reading a Hugging Face config.json: typed fields, and errors that name the field."""

from collections.abc import Mapping
from typing import Any

from jengine.errors import LoadError


class ConfigFields:
    """Typed access to the fields several families share."""

    def __init__(self, hf: Mapping[str, Any]) -> None:
        self._hf = hf

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive integer; null counts as absent."""
        value = self._hf.get(name)
        value = default if value is None else value
        if value is None:
            raise LoadError(f"config field {name!r} is missing")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise LoadError(f"config field {name!r} must be a positive integer, got {value!r}")
        return value

    def require(self, name: str, allowed: tuple[Any, ...], default: Any) -> Any:
        value = self._hf.get(name, default)
        if value not in allowed:
            raise LoadError(
                f"config field {name!r} is {value!r}; supported: {', '.join(map(repr, allowed))}"
            )
        return value

    def rope(self) -> tuple[float, Mapping[str, Any] | None]:
        """(theta, scaling): from `rope_parameters` (transformers 5) or `rope_theta`, `rope_scaling`
        and `partial_rotary_factor`.
        """
        parameters = self._hf.get("rope_parameters") or {}
        theta = parameters.get("rope_theta", self._hf.get("rope_theta", 10000.0))
        scaling = {**(parameters or self._hf.get("rope_scaling") or {})}
        if (factor := self._hf.get("partial_rotary_factor")) is not None:
            scaling.setdefault("partial_rotary_factor", factor)
        return float(theta), scaling

    def layer_windows(self, num_layers: int) -> tuple[int | None, ...]:
        """Window of each layer, None for full attention: from `layer_types`, else `sliding_window`
        for all but the first `max_window_layers` (despite its name: those attend fully).
        """
        window = self._hf.get("sliding_window")
        kinds = self._hf.get("layer_types")
        if kinds is None:
            if not self._hf.get("use_sliding_window", True):
                window = None
            full = self._hf.get("max_window_layers") or 0
            return tuple(None if i < full else window for i in range(num_layers))
        if len(kinds) != num_layers:
            raise LoadError(
                f"config field 'layer_types' has {len(kinds)} entries for {num_layers} layers"
            )
        windows: list[int | None] = []
        for kind in kinds:
            if kind == "full_attention":
                windows.append(None)
            elif kind == "sliding_attention" and window is not None:
                windows.append(window)
            else:
                raise LoadError(
                    f"config field 'layer_types' has {kind!r}, which is not supported here"
                )
        return tuple(windows)


def periodic_layer_types(num_layers: int, period: int) -> list[str]:
    """What `layer_types` is where a config.json leaves it out: every `period`-th layer attends
    fully, the others within a window.
    """
    kinds = ("full_attention", "sliding_attention")
    return [kinds[bool((layer + 1) % period)] for layer in range(num_layers)]
