"""Safetensors folders: values, slices, damage, and how much memory reading takes."""

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jengine.errors import LoadError
from jengine.loading.safetensors_source import SafetensorsSource
from tests.oracles.tiny_llama import make_tiny_llama

RNG = np.random.default_rng(0)
REPO = Path(__file__).resolve().parents[2]


def write(folder: Path, **tensors: np.ndarray) -> None:
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
def test_reads_values_and_row_slices(tmp_path: Path, dtype: type) -> None:
    value = RNG.standard_normal((7, 3, 2)).astype(dtype)
    write(tmp_path, x=value, bias=value[:, 0, 0].copy())
    source = SafetensorsSource(tmp_path)
    assert sorted(source.names()) == ["bias", "x"]
    assert source.shape("x") == (7, 3, 2)
    for rows in (None, slice(0, 7), slice(2, 5), slice(6, 7)):
        read = source.read("x", rows)
        assert read.dtype == dtype
        assert read.tobytes() == value[rows or slice(None)].tobytes()
    assert source.read("bias", slice(1, 3)).tobytes() == value[1:3, 0, 0].tobytes()


def test_reads_bfloat16_in_a_process_that_imported_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, x=np.full(3, 1.5, ml_dtypes.bfloat16))
    code = (
        "from pathlib import Path\n"
        "from jengine.loading.safetensors_source import SafetensorsSource\n"
        f"print(SafetensorsSource(Path({str(tmp_path)!r})).read('x').astype(float))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert run.stdout.strip() == "[1.5 1.5 1.5]", run.stderr


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_equals_the_transformers_model(tmp_path: Path, shard_size: str) -> None:
    model = make_tiny_llama(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").is_file() == (shard_size == "20KB")
    source = SafetensorsSource(tmp_path)
    expected = {name: value.numpy() for name, value in model.state_dict().items()}
    assert sorted(source.names()) == sorted(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(source.read(name), value)


def test_reads_integers(tmp_path: Path) -> None:
    write(tmp_path, x=np.arange(3))
    np.testing.assert_array_equal(SafetensorsSource(tmp_path).read("x"), np.arange(3))


def test_other_dtypes_are_refused(tmp_path: Path) -> None:
    write(tmp_path, x=np.array([True]))
    with pytest.raises(LoadError, match="tensor 'x' has dtype BOOL"):
        SafetensorsSource(tmp_path)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    write(tmp_path, x=np.zeros((40, 40), np.float32))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(LoadError, match=r"model.safetensors is not a readable safetensors file"):
        SafetensorsSource(tmp_path)


def test_index_must_be_true(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    file = content["weight_map"]["model.norm.weight"]
    content["weight_map"]["model.extra.weight"] = file
    index.write_text(json.dumps(content))
    with pytest.raises(LoadError, match=f"tensor 'model.extra.weight' is not in {file}"):
        SafetensorsSource(tmp_path)
    del content["weight_map"]["model.extra.weight"]
    index.write_text(json.dumps(content))
    (tmp_path / file).rename(tmp_path / "moved")
    with pytest.raises(LoadError, match=f"{file} is missing"):
        SafetensorsSource(tmp_path)
    index.write_text("[]")
    with pytest.raises(LoadError, match="not a valid index"):
        SafetensorsSource(tmp_path)


# A process of its own: its memory is not mixed with what other tests left behind.
MEASURE = """
import sys, threading, time
from pathlib import Path
import jax
import numpy as np
from jengine.layers.param import ParamInfo
from jengine.loading.rules import WeightRule, WeightTable, load_parameters
from jengine.loading.safetensors_source import SafetensorsSource

def anonymous_bytes():  # pages of mapped files are the kernel's to drop: not counted
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous_bytes() - final)
        time.sleep(0.0005)

rows, columns = {shape}
table = WeightTable((
    WeightRule("a", "fused", (rows // 2, columns)),
    WeightRule("b", "fused", (rows // 2, columns), offset=rows // 2),
    WeightRule("c", "single", (rows, columns)),
))
whole = ParamInfo((rows, columns), "{dtype}", (None, None))
abstract = {{"fused": whole, "single": whole}}
device = jax.devices()[0]
jax.device_put(np.ones(4), device)  # the runtime's own memory
final, peak, done = 0, 0, False
start = anonymous_bytes()
thread = threading.Thread(target=watch)
thread.start()

def put(path, read):
    global final
    array = jax.device_put(read(), device).block_until_ready()
    final += array.nbytes
    return array

source = SafetensorsSource(Path({folder!r}))
loaded = load_parameters(source, table, abstract, put)
done = True
thread.join()
assert float(loaded["single"][-1, -1]) == 3 and float(loaded["fused"][0, 0]) == 1
print((peak - start) / loaded["single"].nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_beyond_the_result_stays_below_one_tensor(tmp_path: Path, dtype: str) -> None:
    rows, columns = 4096, 4096
    whole, half = (np.empty((n, columns), ml_dtypes.bfloat16) for n in (rows, rows // 2))
    write(tmp_path, a=np.full_like(half, 1), b=np.full_like(half, 2), c=np.full_like(whole, 3))
    code = MEASURE.format(shape=(rows, columns), dtype=dtype, folder=str(tmp_path))
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 1.2
