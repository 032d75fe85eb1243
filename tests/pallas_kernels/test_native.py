"""Building and loading the C++ library; the paths of machines without AVX-512."""

import importlib
import logging
import multiprocessing
import platform
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jengine.pallas_kernels import native
from jengine.pallas_kernels.linear import cpu_ffi, linear
from jengine.pallas_kernels.native import build, loader

needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")


@pytest.fixture
def fresh_loader(monkeypatch: pytest.MonkeyPatch):
    """`loader.status` forgets what it found, before and after."""
    loader.status.cache_clear()
    yield
    monkeypatch.undo()
    loader.status.cache_clear()


def test_disabled_by_the_environment(fresh_loader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JENGINE_NATIVE", "0")
    assert not native.is_available()
    assert native.fingerprint() == "plain"
    assert "JENGINE_NATIVE" in native.describe()["native kernels"]
    x, w = jnp.ones((1, 4)), jnp.ones((2, 4))
    with pytest.raises(NotImplementedError):
        cpu_ffi.linear(x, w)
    np.testing.assert_array_equal(np.asarray(linear(x, w)), 4.0)


@pytest.mark.parametrize("fault", ["no compiler", "broken compiler", "unwritable cache"])
def test_failures_warn_once_and_fall_back(
    fresh_loader,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    fault: str,
) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'no such thing' >&2\nexit 3\n")
    broken.chmod(0o755)
    cache = tmp_path / "cache"
    if fault == "unwritable cache":
        cache.write_text("a file")
    monkeypatch.setenv("JENGINE_CACHE", str(cache))
    if fault != "unwritable cache":
        monkeypatch.setattr(
            build, "find_compiler", lambda: None if fault == "no compiler" else str(broken)
        )
    elif build.find_compiler() is None:
        pytest.skip("no C++ compiler")
    with caplog.at_level(logging.WARNING, loader.logger.name):
        assert not native.is_available()
        assert not native.is_available()
    assert len(caplog.records) == 1
    assert "plain JAX" in caplog.text


@needs_compiler
def test_processes_share_one_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processes at once: one compiles, all get the same file, nothing else stays behind."""
    sources = tmp_path / "src"
    sources.mkdir()
    (sources / "tiny.cc").write_text('extern "C" int jengine_tiny() { return 7; }\n')
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        paths = pool.starmap(build_tiny, [(str(sources), str(tmp_path / "cache"))] * 3)
    assert len(set(paths)) == 1
    assert sorted(p.name for p in Path(paths[0]).parent.iterdir()) == [build.LIBRARY_NAME, "lock"]


def build_tiny(sources: str, cache: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "SOURCES", Path(sources))
        patch.setenv("JENGINE_CACHE", cache)
        return str(build.build_library())


@pytest.fixture(scope="module", params=["-march=x86-64-v3", "-march=x86-64"])
def portable(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A library for older machines beside the native one, under other handler names."""
    compiler = build.find_compiler()
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("needs a C++ compiler for x86-64")
    path = tmp_path_factory.mktemp("portable") / build.LIBRARY_NAME
    build.compile_library(compiler, path, request.param)
    prefix = "portable" + request.param.replace("-", "_").replace("=", "_") + "_"
    loader.register(path, prefix)
    return prefix


@pytest.mark.slow
@pytest.mark.parametrize("operation", loader.OPERATIONS)
def test_older_machines_pass_the_same_tests(
    portable: str, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = importlib.import_module(f"jengine.pallas_kernels.{operation}.cpu_ffi")
    monkeypatch.setattr(backend, "TARGET", portable + operation)
    tests = importlib.import_module(f"tests.pallas_kernels.test_{operation}")
    if operation == "argmax_rows":
        for columns in tests.COLUMNS:
            tests.test_first_largest_or_first_nan(backend, columns)
        return
    for case in tests.CASES:
        check = (
            tests.test_equals_assignment if operation == "kv_write" else tests.test_equals_float64
        )
        check(backend, case)
    if operation == "linear":
        for dtype in ("bfloat16", "float32"):
            tests.test_bits_of_a_row_do_not_depend_on_the_batch(backend, dtype, 90, 33)
    if operation == "ragged_paged_attention":
        for case in tests.INVARIANT:
            tests.test_bits_of_a_row_do_not_depend_on_chunks_or_neighbours(backend, case)
