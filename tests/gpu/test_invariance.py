"""On a GPU a row has the same bits in any batch: operation by operation, and requests through the
engine.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.test_tokens import FAMILIES

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

PROGRAM = """
import sys
from jengine.config import EngineConfig
from jengine.determinism import check

config = EngineConfig.from_kwargs(
    sys.argv[1], dtype="bfloat16", skip_tokenizer_init=True, max_model_len=2304, num_pages=2048,
    batch_invariant=True,
)
for difference in check(config, lambda line: print(line, file=sys.stderr)):
    print(difference)
"""


@pytest.mark.parametrize("part", ["products", "others", "experts", "attention"])
def test_operations(part: str) -> None:
    done = run("-m", "tests.gpu.invariance", part)
    assert set(done.splitlines()) == {"ok"}


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_requests(family: str, tmp_path: Path) -> None:
    from tests.oracles.tiny_llama import make_tiny_llama

    make_tiny_llama(tmp_path, max_position_embeddings=2304, **FAMILIES[family])
    assert run("-c", PROGRAM, str(tmp_path)) == ""


def run(*arguments: str) -> str:
    """In a process of its own: a process has one back end."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "JAX_PLATFORMS": "cuda"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
