"""What a model name leads to, and the errors of names that lead nowhere."""

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest

from jengine.config import ModelArgs
from jengine.errors import LoadError, ModelNotFoundError
from jengine.loading import hub
from jengine.loading.checkpoint import open_checkpoint
from tests.oracles.gguf_files import write_llama_gguf
from tests.oracles.tiny_llama import EOS, make_tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    make_tiny_llama(path)
    return path


def test_folder(folder: Path) -> None:
    checkpoint = open_checkpoint(
        ModelArgs(str(folder), hf_overrides={"rms_norm_eps": 0.5, "new": 1})
    )
    assert checkpoint.dialect == "hf" and checkpoint.path == folder
    assert checkpoint.hf_config["architectures"] == ["LlamaForCausalLM"]
    assert (checkpoint.hf_config["rms_norm_eps"], checkpoint.hf_config["new"]) == (0.5, 1)
    assert checkpoint.generation_config["eos_token_id"] == 2
    assert checkpoint.tensors is not None and "model.norm.weight" in checkpoint.tensors.names()
    assert checkpoint.load_tokenizer().eos_token_id == 2


def test_gguf_file_equals_the_folder_it_came_from(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "hf", attention_bias=True)
    expected = write_llama_gguf(tmp_path / "x.gguf", model)
    for name in (tmp_path / "x.gguf", tmp_path):  # a folder with one file stands for the file
        checkpoint = open_checkpoint(ModelArgs(str(name)))
        assert checkpoint.dialect == "gguf" and checkpoint.path == tmp_path / "x.gguf"
    assert checkpoint.tensors is not None
    norm = checkpoint.tensors.read("output_norm.weight")
    np.testing.assert_array_equal(norm, expected["model.norm.weight"])
    ours, theirs = (
        checkpoint.load_tokenizer(),
        open_checkpoint(ModelArgs(str(tmp_path / "hf"))).load_tokenizer(),
    )
    text = "It's 12 o'clock, 世界! <|im_end|> def f(x):\n\treturn x"
    assert ours.encode(text) == theirs.encode(text)
    assert (ours.eos_token_id, ours.bos_token_id, ours.pad_token_id) == (2, 1, 0)
    assert ours.chat_template == theirs.chat_template


def test_dummy_needs_a_config_only(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    for name in (tmp_path, tmp_path / "config.json"):
        checkpoint = open_checkpoint(ModelArgs(str(name), load_format="dummy"))
        assert checkpoint.dialect == "dummy" and checkpoint.tensors is None
    with pytest.raises(LoadError, match="load_format 'dummy' makes random ones"):
        open_checkpoint(ModelArgs(str(tmp_path)))
    with pytest.raises(LoadError, match=r"holds no tokenizer\.json"):
        checkpoint.load_tokenizer()
    assert checkpoint.load_tokenizer(str(folder)).special_tokens["eos_token"] == EOS


def test_dummy_of_a_gguf_file(smollm2_gguf: Path) -> None:
    checkpoint = open_checkpoint(ModelArgs(str(smollm2_gguf), load_format="dummy"))
    assert checkpoint.dialect == "dummy" and checkpoint.tensors is None
    assert checkpoint.hf_config["num_hidden_layers"] == 30


def test_pulled_name(smollm2_gguf: Path) -> None:
    assert open_checkpoint(ModelArgs("smollm2-135m")).path == smollm2_gguf


def test_name_that_was_not_pulled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JENGINE_CACHE", str(tmp_path))
    with pytest.raises(ModelNotFoundError, match="run 'jengine pull smollm2-135m'"):
        open_checkpoint(ModelArgs("smollm2-135m"))


def test_hub_models_offline(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite sets HF_HUB_OFFLINE: what the Hub's cache has is found, the rest fails at once."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    started = time.perf_counter()
    with pytest.raises(ModelNotFoundError, match="HF_HUB_OFFLINE is set"):
        open_checkpoint(ModelArgs("nobody/nothing"))
    assert time.perf_counter() - started < 5
    commit = "0" * 40
    snapshot = tmp_path / "models--somebody--something" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    reference = snapshot.parents[1] / "refs" / "main"
    reference.parent.mkdir()
    reference.write_text(commit)
    with pytest.raises(ModelNotFoundError, match=r"somebody/something holds no config\.json"):
        open_checkpoint(ModelArgs("somebody/something"))
    for file in folder.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    checkpoint = open_checkpoint(ModelArgs("somebody/something"))
    assert checkpoint.path == snapshot and checkpoint.dialect == "hf"


def test_hub_errors_say_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    def build(kind: type[Exception], text: str = "x") -> Exception:
        error = kind.__new__(kind)  # their __init__ wants a response of an HTTP client
        error.args = (text,)
        return error

    cases = [
        (build(errors.RepositoryNotFoundError), "the Hub has no such model"),
        (build(errors.RevisionNotFoundError), "has no revision 'v9'"),
        (build(errors.GatedRepoError), "restricted"),
        (build(errors.LocalEntryNotFoundError), "the Hub cannot be reached"),
        (build(errors.HfHubHTTPError, "boom"), "boom"),
    ]
    monkeypatch.setattr(hub, "is_hub_offline", lambda: False)
    for error, message in cases:

        def fail(*args: object, error: Exception = error, **options: object) -> None:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(ModelNotFoundError, match=re.escape(message)):
            open_checkpoint(ModelArgs("org/model", revision="v9"))


def test_only_needed_files_are_asked_for(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    import huggingface_hub

    asked = []

    def download(*args: object, allow_patterns: list[str], **options: object) -> str:
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    open_checkpoint(ModelArgs("org/model"))
    open_checkpoint(ModelArgs("org/model", load_format="dummy"))
    with_weights, without = asked
    assert "model-*.safetensors" in with_weights and not any(".bin" in p for p in with_weights)
    assert not any("safetensors" in pattern for pattern in without)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "does not exist"),
        ("./nothing", "does not exist"),
        ("missing.gguf", "does not exist"),
        ("a/b/c", "no Hub id"),
        ("", "is neither a folder|no Hub id|holds no config"),
    ],
)
def test_names_that_lead_nowhere(name: str, message: str) -> None:
    with pytest.raises((ModelNotFoundError, LoadError), match=message):
        open_checkpoint(ModelArgs(name))


def test_folders_that_cannot_be_read(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(LoadError, match=r"holds no config\.json"):
        open_checkpoint(ModelArgs(str(tmp_path)))
    for content, message in (("{", "cannot be read"), ("[1]", "does not hold a JSON object")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(LoadError, match=message):
            open_checkpoint(ModelArgs(str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(LoadError, match="load_format is 'gguf'"):
        open_checkpoint(ModelArgs(str(folder), load_format="gguf"))


def test_format_that_contradicts_the_file(smollm2_gguf: Path) -> None:
    with pytest.raises(LoadError, match="is a GGUF file, but load_format is 'safetensors'"):
        open_checkpoint(ModelArgs(str(smollm2_gguf), load_format="safetensors"))


def test_several_gguf_files_in_a_folder(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(LoadError, match=r"holds 2 \.gguf files: name one"):
        open_checkpoint(ModelArgs(str(tmp_path)))
