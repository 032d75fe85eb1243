"""Which checkpoint tensor fills which parameter, as a table, and the loader that obeys it.

Loading fails, naming the tensor, on a source that no rule matches, a source that is missing, rows
of a parameter that two sources fill, and a shape that is not what the rule says.
"""

import bisect
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from jengine.errors import LoadError
from jengine.layers.param import ParamInfo
from jengine.loading.arrays import aligned_empty, cast_into, numpy_dtype
from jengine.loading.checkpoint import TensorSource

Placed = TypeVar("Placed")  # a parameter where `put` put it: a jax.Array in the engine

Pieces = tuple[tuple[slice, ...], ...]  # of each dimension, in order
LAYER = "{i}"  # stands for any layer index in a rule's source and target
EXPERT = "{e}"  # stands for any expert index in a rule's source; its target stacks the experts
CHUNK_BYTES = (
    8 << 20
)  # read at once: large enough for full disk speed, small beside any large tensor


@dataclass(frozen=True)
class WeightRule:
    """`source` fills rows `[offset, offset + shape[0])` of `target`. `{i}` stands for any layer
    index. A source with `{e}` fills those rows of its expert's part of a target [E, rows, ...].
    """

    source: str
    target: str
    shape: tuple[int, ...]  # of the source
    offset: int = 0
    transform: Callable[[np.ndarray], np.ndarray] | None = None  # of the whole source
    optional: bool = (
        False  # where the source is absent, the target's rows keep their initial ones or zeros
    )
    transformed: tuple[int, ...] | None = None  # shape that the transform gives, if it is another
    is_part: bool = False  # the transform takes a part, other rules of the same source the rest

    @property
    def filled(self) -> tuple[int, ...]:
        """Shape of what goes into the target."""
        return self.shape if self.transformed is None else self.transformed


@dataclass(frozen=True)
class WeightTable:
    """The rules of one family in one naming. Sources that match an `ignored` fnmatch pattern are
    skipped.
    """

    rules: tuple[WeightRule, ...]
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fill:
    """One source, resolved: its name and the rows of a parameter that it fills. Where experts are
    stacked, rows are counted through all of them.
    """

    source: str
    target: str
    start: int
    stop: int
    rule: WeightRule


def load_parameters(
    tensors: TensorSource,
    table: WeightTable,
    abstract: Mapping[str, ParamInfo],
    put: Callable[[str, "Reader"], Placed],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Placed]:
    """Fill every parameter of `abstract`, cast to its dtype (nearest even).

    `put` places a parameter: it reads it, whole or in pieces, and may keep the arrays, which are
    never written again. `progress(done, total)` counts bytes of parameters.
    """
    plan = plan_fills(tensors, table, abstract)
    total = sum(info.num_bytes for info in abstract.values())
    done = 0
    progress(done, total)
    parameters = {}
    for path, info in abstract.items():
        parameters[path] = put(path, Reader(tensors, info, plan[path]))
        done += info.num_bytes
        progress(done, total)
    return parameters


class Reader:
    """Reads one parameter, or pieces of it: of untransformed sources only the bytes asked for."""

    def __init__(self, tensors: TensorSource, info: ParamInfo, fills: Sequence[Fill]) -> None:
        """`fills` in the order of rows."""
        self._tensors, self._info, self._fills = tensors, info, fills
        self._transformed: dict[Fill, np.ndarray] | None = None  # for the next pieces

    def __call__(self, pieces: Pieces | None = None) -> np.ndarray:
        """A new array: for each dimension the pieces side by side, by default all of it."""
        info = self._info
        if pieces is None:
            pieces = tuple((slice(0, size),) for size in info.shape)
        elif self._transformed is None:
            self._transformed = {}
        shape = tuple(sum(p.stop - p.start for p in along) for along in pieces)
        value = aligned_empty(shape, numpy_dtype(info.dtype))
        if info.init != "normal":
            value[...] = 1 if info.init == "ones" else 0
        if not self._fills:
            return value
        rows, columns, out = pieces[0], pieces[1:], value
        if EXPERT in self._fills[0].rule.source:  # rows are counted through all experts
            rows, columns = _rows_of_experts(pieces[0], pieces[1], info.shape[1]), pieces[2:]
            out = value.reshape(-1, *shape[2:])  # a view
        stops = [piece.stop for piece in rows]
        places = np.cumsum([0, *(piece.stop - piece.start for piece in rows)]).tolist()
        for fill in self._fills:
            for i in range(bisect.bisect_right(stops, fill.start), len(rows)):
                start, stop = max(rows[i].start, fill.start), min(rows[i].stop, fill.stop)
                if start >= stop:
                    break
                place = places[i] + start - rows[i].start
                part = slice(start - fill.start, stop - fill.start)
                self._read_into(fill, part, columns, out[place : place + stop - start])
        return value

    def _read_into(self, fill: Fill, rows: slice, columns: Pieces, out: np.ndarray) -> None:
        """Read rows of one source, in chunks where no transform needs all of it at once."""
        if fill.rule.transform is not None:
            value = self._transform(fill)[rows]
            cast_into(out, _take(value, columns), fill.source)
            return
        row_bytes = 4 * int(
            np.prod(fill.rule.shape[1:], dtype=np.int64)
        )  # as f32, which dequantising gives
        step = max(1, CHUNK_BYTES // max(1, row_bytes))
        # One piece of axis 1 is cut from the file, the rest from what was read.
        is_cut = len(columns) == 1 and columns[0] != (slice(0, fill.rule.shape[1]),)
        column = columns[0][0] if is_cut and len(columns[0]) == 1 else None
        for start in range(rows.start, rows.stop, step):
            chunk = slice(start, min(start + step, rows.stop))
            value = self._tensors.read(fill.source, chunk, column)
            if column is None:
                value = _take(value, columns)
            cast_into(out[start - rows.start : chunk.stop - rows.start], value, fill.source)
            del value  # else two chunks would be in memory

    def _transform(self, fill: Fill) -> np.ndarray:
        assert fill.rule.transform is not None
        kept = self._transformed
        if kept is not None and fill in kept:
            return kept[fill]
        value = fill.rule.transform(self._tensors.read(fill.source))
        if value.shape != fill.rule.filled:
            raise LoadError(
                f"the transform of tensor {fill.source!r} changed its shape to {value.shape}"
            )
        if kept is not None:
            kept[fill] = value
        return value


def plan_fills(
    tensors: TensorSource, table: WeightTable, abstract: Mapping[str, ParamInfo]
) -> dict[str, list[Fill]]:
    """Parameter path -> its fills in order of rows. Reads no tensor data; raises `LoadError` if
    anything is off.
    """
    names = list(tensors.names())
    plan: dict[str, list[Fill]] = {path: [] for path in abstract}
    for name, rule, layer, expert in _match(names, table):
        target = rule.target.replace(LAYER, layer)
        if target not in abstract:
            raise LoadError(
                f"tensor {name!r} would fill parameter {target!r}, which the model does not have"
            )
        if tensors.shape(name) != rule.shape:
            raise LoadError(
                f"tensor {name!r} has shape {tensors.shape(name)}, expected {rule.shape}"
            )
        shape = abstract[target].shape
        _check_fits(name, rule, target, shape, expert)
        start = rule.offset + (int(expert) * shape[1] if expert else 0)
        plan[target].append(Fill(name, target, start, start + rule.filled[0], rule))
    _check_nothing_missing(set(names), table.rules, abstract)
    for path, fills in plan.items():
        fills.sort(key=lambda fill: fill.start)
        _check_rows(path, fills, abstract[path], table.rules)
    return plan


def rows_shape(shape: tuple[int, ...], rule: WeightRule) -> tuple[int, ...]:
    """A parameter's shape as `rule` counts its rows: those of stacked experts one after another."""
    return (shape[0] * shape[1], *shape[2:]) if EXPERT in rule.source else shape


def _match(names: Iterable[str], table: WeightTable) -> Iterable[tuple[str, WeightRule, str, str]]:
    """(source, its rule, layer index, expert index) of every source that is not ignored; an index
    is empty where the rule has none. A source has one rule, or several that each take a part.
    """
    exact: dict[str, list[WeightRule]] = {}
    patterns: list[tuple[re.Pattern[str], WeightRule]] = []
    for rule in table.rules:
        if LAYER in rule.source:
            pattern = re.escape(rule.source)
            for group, index in (("layer", LAYER), ("expert", EXPERT)):
                pattern = pattern.replace(re.escape(index), rf"(?P<{group}>0|[1-9]\d*)", 1)
            patterns.append((re.compile(pattern), rule))
        else:
            exact.setdefault(rule.source, []).append(rule)
    for name in names:
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in table.ignored):
            continue
        found: list[tuple[WeightRule, dict[str, str]]] = [
            (rule, {}) for rule in exact.get(name, ())
        ]
        found += [
            (rule, m.groupdict()) for pattern, rule in patterns if (m := pattern.fullmatch(name))
        ]
        if not found:
            raise LoadError(f"tensor {name!r} of the checkpoint is matched by no rule")
        if len(found) > 1 and not all(rule.is_part for rule, _ in found):
            raise LoadError(f"tensor {name!r} is matched by {len(found)} rules")
        for rule, indices in found:
            yield name, rule, indices.get("layer", ""), indices.get("expert", "")


def _check_fits(
    name: str, rule: WeightRule, target: str, shape: tuple[int, ...], expert: str
) -> None:
    if expert:
        if int(expert) >= shape[0]:
            raise LoadError(
                f"tensor {name!r} belongs to an expert that parameter {target!r} of shape {shape} "
                f"does not have"
            )
        shape = shape[1:]
    if rule.filled[1:] != shape[1:] or rule.offset + rule.filled[0] > shape[0]:
        raise LoadError(
            f"tensor {name!r} of shape {rule.filled} does not fit into rows {rule.offset}: of "
            f"parameter {target!r} of shape {shape}"
        )


def _check_nothing_missing(
    names: set[str], rules: Iterable[WeightRule], abstract: Mapping[str, ParamInfo]
) -> None:
    for rule in rules:
        if rule.optional:
            continue
        for layer in _layers_of(rule, abstract):
            target = rule.target.replace(LAYER, layer)
            num_experts = abstract[target].shape[0] if EXPERT in rule.source else 1
            for expert in range(num_experts):
                source = rule.source.replace(LAYER, layer).replace(EXPERT, str(expert))
                if source not in names:
                    raise LoadError(f"tensor {source!r} is missing: parameter {target!r} needs it")


def _layers_of(rule: WeightRule, abstract: Mapping[str, ParamInfo]) -> list[str]:
    """Layer indices (as text) for which the model has the rule's target; [""] for a rule without
    layers.
    """
    if LAYER not in rule.target:
        return [""] if rule.target in abstract else []
    before, _, after = rule.target.partition(LAYER)
    middles = (
        p[len(before) : len(p) - len(after)]
        for p in abstract
        if p.startswith(before) and p.endswith(after)
    )
    return [layer for layer in middles if layer.isdecimal()]


def _check_rows(
    path: str, fills: Sequence[Fill], info: ParamInfo, rules: Iterable[WeightRule]
) -> None:
    """Every row filled once. Gaps are allowed where the rule is optional and the initial value is a
    constant.
    """
    num_rows = rows_shape(info.shape, fills[0].rule)[0] if fills else info.shape[0]
    end = 0
    for fill in fills:
        if fill.start < end:
            before = next(f for f in fills if f is not fill and f.stop > fill.start)
            raise LoadError(
                f"rows {fill.start}:{min(end, fill.stop)} of parameter {path!r} are filled twice, "
                f"by {before.source!r} and by {fill.source!r}"
            )
        if fill.start > end:
            _check_gap(path, end, fill.start, info, rules)
        end = fill.stop
    if end < num_rows:
        _check_gap(path, end, num_rows, info, rules)


def _check_gap(
    path: str, start: int, stop: int, info: ParamInfo, rules: Iterable[WeightRule]
) -> None:
    may_stay = {
        row
        for rule in rules
        if rule.optional and _pattern_matches(rule.target, path)
        for row in (rule.offset, rule.offset + rule.filled[0])
    }
    if info.init == "normal" or start not in may_stay or stop not in may_stay:
        raise LoadError(
            f"no tensor of the checkpoint fills rows {start}:{stop} of parameter {path!r}"
        )


def _pattern_matches(target: str, path: str) -> bool:
    before, _, after = target.partition(LAYER)
    if LAYER not in target:
        return target == path
    return path.startswith(before) and path.endswith(after)


def _rows_of_experts(
    experts: tuple[slice, ...], rows: tuple[slice, ...], num_rows: int
) -> tuple[slice, ...]:
    """Pieces of rows that are counted through all experts."""
    firsts = [expert * num_rows for piece in experts for expert in range(piece.start, piece.stop)]
    return tuple(slice(first + r.start, first + r.stop) for first in firsts for r in rows)


def _take(value: np.ndarray, columns: Pieces) -> np.ndarray:
    """The pieces of every axis but the first."""
    for axis, along in enumerate(columns, 1):
        before = (slice(None),) * axis
        parts = [value[(*before, piece)] for piece in along]
        value = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=axis)
    return value
