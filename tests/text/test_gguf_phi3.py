"""Phi-3's tokenizer out of a GGUF file: what its special tokens do to white space."""

from jengine.text.tokenizer import Tokenizer
from tests.text.test_tokenizer import sentencepiece_metadata

BARE = {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}


def test_its_special_tokens_swallow_white_space() -> None:
    """As `rstrip` in its tokenizer_config.json says."""
    phi3 = Tokenizer.from_gguf(sentencepiece_metadata(**BARE, **{"general.architecture": "phi3"}))
    assert phi3.encode("the</s>\n in") == [*phi3.encode("the"), 2, *phi3.encode("in")]
    assert phi3.encode("<s> in") == [1, *phi3.encode(" in")]  # one that does not


def test_those_of_others_do_not() -> None:
    llama = Tokenizer.from_gguf(sentencepiece_metadata(**BARE))
    assert llama.encode("the</s> in") == [*llama.encode("the"), 2, *llama.encode(" in")]
    assert llama.encode(" in") != llama.encode("in")
