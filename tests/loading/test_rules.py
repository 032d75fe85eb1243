"""Rules: what loads, and that everything that does not fit is refused by name."""

import re
from collections.abc import Callable
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jengine.errors import LoadError
from jengine.layers.param import Initializer, ParamInfo
from jengine.loading import rules
from jengine.loading.arrays import ALIGNMENT, aligned_empty, cast_into
from jengine.loading.rules import Reader, WeightRule, WeightTable, load_parameters

Put = Callable[[str, np.ndarray], np.ndarray]


class DictSource:
    """Tensors in memory. Counts the rows of each read."""

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self.tensors = tensors
        self.reads: list[tuple[str, int]] = []

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def read(
        self, name: str, rows: slice | None = None, columns: slice | None = None
    ) -> np.ndarray:
        value = self.tensors[name][rows or slice(None)]
        value = value if columns is None else value[:, columns]
        self.reads.append((name, value.size if columns is not None else len(value)))
        return value


def keep(path: str, read: Reader) -> np.ndarray:
    return read()


def info(*shape: int, dtype: str = "float32", init: Initializer = "normal") -> ParamInfo:
    return ParamInfo(shape, dtype, (None,) * len(shape), init)


RNG = np.random.default_rng(0)
Q, K, EMBED = (RNG.standard_normal((rows, 4)).astype(np.float32) for rows in (6, 2, 10))
TENSORS = {"l.0.q": Q, "l.0.k": K, "l.1.q": Q + 1, "l.1.k": K + 1, "embed": EMBED}
TABLE = WeightTable(
    (
        WeightRule("l.{i}.q", "layers.{i}.qk", (6, 4)),
        WeightRule("l.{i}.k", "layers.{i}.qk", (2, 4), offset=6),
        WeightRule("embed", "embed", (10, 4)),
    ),
    ignored=("*.inv_freq",),
)
ABSTRACT = {"layers.0.qk": info(8, 4), "layers.1.qk": info(8, 4), "embed": info(10, 4)}


def load(tensors=TENSORS, table=TABLE, abstract=ABSTRACT, **options):
    return load_parameters(DictSource(tensors), table, abstract, keep, **options)


def test_fused_parameters_are_filled_by_rows() -> None:
    loaded = load({**TENSORS, "l.0.inv_freq": np.zeros(3)})
    assert list(loaded) == list(ABSTRACT)
    np.testing.assert_array_equal(loaded["layers.0.qk"], np.concatenate([Q, K]))
    np.testing.assert_array_equal(loaded["layers.1.qk"], np.concatenate([Q + 1, K + 1]))
    np.testing.assert_array_equal(loaded["embed"], EMBED)


def test_transform_sees_the_whole_source() -> None:
    flipped = WeightRule("embed", "embed", (10, 4), transform=lambda x: x[::-1])
    loaded = load(table=WeightTable((*TABLE.rules[:2], flipped)))
    np.testing.assert_array_equal(loaded["embed"], EMBED[::-1])


EXPERTS = {
    f"l.{i}.experts.{e}.{name}": RNG.standard_normal((rows, 4)).astype(np.float32)
    for i in (0, 1)
    for e in range(11)  # ten comes after nine, not after one
    for name, rows in (("gate", 3), ("up", 3))
}
EXPERT_TABLE = WeightTable(
    (
        WeightRule("l.{i}.experts.{e}.gate", "layers.{i}.gate_up", (3, 4)),
        WeightRule(
            "l.{i}.experts.{e}.up", "layers.{i}.gate_up", (3, 4), 3, transform=lambda x: x[::-1]
        ),
    )
)
STACKED = {"layers.0.gate_up": info(11, 6, 4), "layers.1.gate_up": info(11, 6, 4)}


def test_experts_are_stacked() -> None:
    loaded = load(EXPERTS, EXPERT_TABLE, STACKED)
    for i in (0, 1):
        for e in range(11):
            gate, up = (EXPERTS[f"l.{i}.experts.{e}.{name}"] for name in ("gate", "up"))
            got = loaded[f"layers.{i}.gate_up"][e]
            np.testing.assert_array_equal(got, np.concatenate([gate, up[::-1]]))


def test_experts_that_do_not_fit_are_refused_by_name() -> None:
    def refused(message: str, tensors=EXPERTS, abstract=STACKED, table=EXPERT_TABLE) -> None:
        with pytest.raises(LoadError, match=re.escape(message)):
            load(tensors, table, abstract)

    lacking = {name: value for name, value in EXPERTS.items() if name != "l.1.experts.10.up"}
    refused("tensor 'l.1.experts.10.up' is missing: parameter 'layers.1.gate_up'", lacking)
    one_more = {**EXPERTS, "l.0.experts.11.up": EXPERTS["l.0.experts.0.up"]}
    refused("tensor 'l.0.experts.11.up' belongs to an expert that parameter", one_more)
    narrow = {name: info(11, 5, 4) for name in STACKED}
    refused("experts.0.up' of shape (3, 4) does not fit into rows 3:", abstract=narrow)
    wide = {name: info(11, 7, 4) for name in STACKED}
    refused("no tensor of the checkpoint fills rows 6:7 of parameter 'layers.0", abstract=wide)


def test_transform_may_change_the_shape_to_one_that_is_said() -> None:
    turned = WeightRule(
        "embed", "embed", (10, 4), transform=lambda x: x.T, transformed=(4, 10), offset=1
    )
    table = WeightTable((*TABLE.rules[:2], turned, WeightRule("first", "embed", (1, 10))))
    first = np.ones((1, 10), np.float32)
    loaded = load({**TENSORS, "first": first}, table, {**ABSTRACT, "embed": info(5, 10)})
    np.testing.assert_array_equal(loaded["embed"], np.concatenate([first, EMBED.T]))
    lying = replace(turned, transformed=(4, 10), transform=lambda x: x)
    with pytest.raises(LoadError, match="changed its shape to"):
        table = WeightTable((*TABLE.rules[:2], lying, table.rules[3]))
        load({**TENSORS, "first": first}, table, {**ABSTRACT, "embed": info(5, 10)})


def test_parts_of_one_source_fill_several_parameters() -> None:
    rules_of_parts = tuple(
        WeightRule("l.{i}.q", f"layers.{{i}}.{target}", (6, 4), transform=transform,
                   transformed=shape, is_part=True)
        for target, transform, shape in (
            ("head", lambda rows: rows[:2].T, (4, 2)),
            ("tail", lambda rows: rows[2:], (4, 4)),
        )
    )  # fmt: skip
    abstract = {"layers.0.head": info(4, 2), "layers.0.tail": info(4, 4)}
    loaded = load({"l.0.q": Q}, WeightTable(rules_of_parts), abstract)
    np.testing.assert_array_equal(loaded["layers.0.head"], Q[:2].T)
    np.testing.assert_array_equal(loaded["layers.0.tail"], Q[2:])
    whole = replace(rules_of_parts[0], is_part=False)
    with pytest.raises(LoadError, match=r"'l\.0\.q' is matched by 2 rules"):
        load({"l.0.q": Q}, WeightTable((whole, rules_of_parts[1])), abstract)
    with pytest.raises(LoadError, match=r"'l\.0\.q' is missing"):
        load({}, WeightTable(rules_of_parts), abstract)


def test_ignored_sources_are_skipped_though_a_rule_matches_them() -> None:
    tensors = {**TENSORS, "l.2.q": Q}
    with pytest.raises(LoadError, match=r"'l\.2\.q' would fill"):
        load(tensors)
    assert list(load(tensors, replace(TABLE, ignored=("l.2.*",)))) == list(ABSTRACT)


def test_large_sources_are_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "CHUNK_BYTES", 3 * 4 * 4)  # three rows of four float32
    source = DictSource(TENSORS)
    loaded = load_parameters(source, TABLE, ABSTRACT, keep)
    np.testing.assert_array_equal(loaded["embed"], EMBED)
    assert [rows for name, rows in source.reads if name == "embed"] == [3, 3, 3, 1]


def test_progress_counts_parameter_bytes() -> None:
    seen = []
    load(progress=lambda done, total: seen.append((done, total)))
    total = (8 * 4 + 8 * 4 + 10 * 4) * 4
    assert seen == [(0, total), (128, total), (256, total), (total, total)]


def broken(change: str) -> dict:
    """Arguments of `load` with one thing wrong."""
    rule = TABLE.rules[2]
    match change:
        case "unmatched source":
            return {"tensors": {**TENSORS, "l.0.surprise": Q}}
        case "layer beyond the model":
            return {"tensors": {**TENSORS, "l.2.q": Q, "l.2.k": K}}
        case "missing source":
            return {"tensors": {k: v for k, v in TENSORS.items() if k != "l.1.k"}}
        case "missing plain source":
            return {"tensors": {k: v for k, v in TENSORS.items() if k != "embed"}}
        case "wrong shape":
            return {"tensors": {**TENSORS, "embed": EMBED.T}}
        case "two rules for a source":
            return {"table": WeightTable((*TABLE.rules, rule))}
        case "two sources for the same rows":
            again = replace(rule, source="again", shape=(4, 4), offset=3)
            return {
                "tensors": {**TENSORS, "again": EMBED[:4]},
                "table": WeightTable((*TABLE.rules, again)),
            }
        case "rows that nobody fills":
            return {"abstract": {**ABSTRACT, "embed": info(12, 4)}}
        case "parameter that nobody fills":
            return {"abstract": {**ABSTRACT, "head": info(3)}}
        case "source larger than its parameter":
            return {"abstract": {**ABSTRACT, "embed": info(9, 4)}}
        case "transform that changes the shape":
            turned = replace(rule, transform=lambda x: x.T)
            return {"table": WeightTable((*TABLE.rules[:2], turned))}
    raise AssertionError(change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("unmatched source", "tensor 'l.0.surprise' of the checkpoint is matched by no rule"),
        ("layer beyond the model", "tensor 'l.2.q' would fill parameter 'layers.2.qk'"),
        ("missing source", "tensor 'l.1.k' is missing: parameter 'layers.1.qk' needs it"),
        ("missing plain source", "tensor 'embed' is missing: parameter 'embed' needs it"),
        ("wrong shape", "tensor 'embed' has shape (4, 10), expected (10, 4)"),
        ("two rules for a source", "tensor 'embed' is matched by 2 rules"),
        (
            "two sources for the same rows",
            "rows 3:7 of parameter 'embed' are filled twice, by 'embed' and by 'again'",
        ),
        (
            "rows that nobody fills",
            "no tensor of the checkpoint fills rows 10:12 of parameter 'embed'",
        ),
        (
            "parameter that nobody fills",
            "no tensor of the checkpoint fills rows 0:3 of parameter 'head'",
        ),
        ("source larger than its parameter", "tensor 'embed' of shape (10, 4) does not fit"),
        ("transform that changes the shape", "tensor 'embed' changed its shape to (4, 10)"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: str, message: str) -> None:
    with pytest.raises(LoadError, match=re.escape(message)):
        load(**broken(change))


def test_optional_sources_leave_initial_values() -> None:
    table = WeightTable(
        (
            WeightRule("a.bias", "bias", (2,), optional=True),
            WeightRule("b.bias", "bias", (3,), offset=2, optional=True),
            WeightRule("norm", "norm", (2,), optional=True),
        )
    )
    abstract = {"bias": info(5, init="zeros"), "norm": info(2, init="ones")}
    loaded = load({"b.bias": np.arange(1.0, 4.0, dtype=np.float32)}, table, abstract)
    assert loaded["bias"].tolist() == [0, 0, 1, 2, 3]
    assert loaded["norm"].tolist() == [1, 1]
    with pytest.raises(LoadError, match="rows 0:5 of parameter 'bias'"):
        load({}, table, {"bias": info(5, init="normal")})


def nearest_even_bfloat16(value: np.ndarray) -> np.ndarray:
    """By definition: add half of the last kept bit, less one unless that bit is odd, and cut."""
    bits = value.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_bfloat16_rounds_to_nearest_even(values: list[float]) -> None:
    value = np.array(values, np.float32)
    out = np.empty(value.shape, ml_dtypes.bfloat16)
    cast_into(out, value, "x")
    np.testing.assert_array_equal(out.view(np.uint16), nearest_even_bfloat16(value))


def test_bfloat16_ties_go_to_even() -> None:
    ulp = 2.0**-7
    value = np.array([1 + ulp / 2, 1 + 3 * ulp / 2, np.nan, np.inf], np.float32)
    out = np.empty(4, ml_dtypes.bfloat16)
    cast_into(out, value, "x")
    assert out[:2].astype(float).tolist() == [1.0, 1 + 2 * ulp]
    assert np.isnan(out[2]) and np.isinf(out[3])


def test_float16_overflow_is_an_error_and_infinity_is_not() -> None:
    out = np.empty(2, np.float16)
    cast_into(out, np.array([np.inf, 65504], np.float32), "x")
    assert out.tolist() == [np.inf, 65504]
    with pytest.raises(LoadError, match="tensor 'big' has values that float16 cannot hold"):
        cast_into(out, np.array([np.inf, 65520], np.float32), "big")


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_xla_takes_aligned_arrays_over_without_a_copy(dtype: type) -> None:
    jax = pytest.importorskip("jax")
    value = aligned_empty((33, 65), np.dtype(dtype))
    value[...] = 1
    assert value.ctypes.data % ALIGNMENT == 0
    device = jax.local_devices(backend="cpu")[0]
    assert jax.device_put(value, device).unsafe_buffer_pointer() == value.ctypes.data


def test_pieces_are_cut_from_the_sources() -> None:
    """Of a fused projection with a transformed part, of stacked experts, of columns: what a rank
    asks for is what the whole array holds there, and nothing else is read.
    """
    tensors = {
        "q": RNG.standard_normal((8, 6)).astype(np.float32),
        "k": RNG.standard_normal((4, 6)).astype(np.float32),
        **{f"0.e.{e}.gate": RNG.standard_normal((4, 6)).astype(np.float32) for e in range(4)},
        **{f"0.e.{e}.up": RNG.standard_normal((4, 6)).astype(np.float32) for e in range(4)},
        "down": RNG.standard_normal((6, 8)).astype(np.float32),
        "gate_up": RNG.standard_normal((3, 6, 8)).astype(np.float32),
    }
    table = WeightTable(
        (
            WeightRule("q", "qk", (8, 6)),
            WeightRule("k", "qk", (4, 6), offset=8, transform=lambda rows: rows[::-1]),
            WeightRule("{i}.e.{e}.gate", "{i}.experts", (4, 6)),
            WeightRule("{i}.e.{e}.up", "{i}.experts", (4, 6), offset=4),
            WeightRule("down", "down", (6, 8)),
            WeightRule(
                "gate_up", "stacked", (3, 6, 8), transform=lambda w: w.swapaxes(1, 2),
                transformed=(3, 8, 6),
            ),
        )
    )  # fmt: skip
    abstract = {
        "qk": info(12, 6), "0.experts": info(4, 8, 6), "down": info(6, 8), "stacked": info(3, 8, 6),
    }  # fmt: skip
    source = DictSource(tensors)
    whole = load_parameters(source, table, abstract, keep)
    readers = load_parameters(source, table, abstract, lambda path, read: read)
    source.reads.clear()

    def check(path: str, *pieces: tuple[slice, ...]) -> None:
        rows = [np.r_[along] for along in pieces]
        np.testing.assert_array_equal(readers[path](pieces), whole[path][np.ix_(*rows)])

    everything = (slice(0, 6),)
    check("qk", (slice(2, 4), slice(9, 11)), everything)
    check("qk", (slice(0, 2), slice(11, 12)), everything)
    assert source.reads == [("q", 2), ("k", 4), ("q", 2)]  # what is transformed, once
    source.reads.clear()
    check("0.experts", (slice(1, 3),), (slice(2, 4), slice(6, 8)), everything)
    assert source.reads == [(f"0.e.{e}.{part}", 2) for e in (1, 2) for part in ("gate", "up")]
    source.reads.clear()
    check("down", everything, (slice(4, 6),))
    check("down", everything, (slice(0, 2), slice(4, 6)))
    assert source.reads == [("down", 12), ("down", 6)]  # values; rows, from which two are taken
    check("stacked", (slice(2, 3),), (slice(0, 2), slice(4, 6)), (slice(3, 6),))


def test_integers_are_no_weights_and_weights_no_integers() -> None:
    for out, value in (
        (np.float32, np.int8),
        (ml_dtypes.bfloat16, np.int64),
        (np.int32, np.float32),
    ):
        with pytest.raises(LoadError, match="tensor 'x' has dtype"):
            cast_into(aligned_empty((2,), np.dtype(out)), np.ones(2, value), "x")
    table = aligned_empty((2,), np.dtype(np.int32))
    cast_into(table, np.array([3, 1]), "x")
    assert table.tolist() == [3, 1]
