import hashlib
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from jengine.core.page_pool import IntegrityError
from jengine.core.prefix_cache import PageHasher, PrefixCache

# sha256 over the documented bytes, computed once by hand; must never change without a new version.
GOLDEN = "4766e56a2d2379898ddac887a869d54c5d2f92016c44a0a55b1a7463e56bda6e"


def chain_of(
    tokens: list[int], *, page_size: int = 2, fingerprint: str = "", salt: str = ""
) -> list[bytes]:
    hasher = PageHasher(page_size, fingerprint)
    chain = hasher.start(salt)
    hasher.extend(chain, tokens, len(tokens) // page_size)
    return chain


def test_digests_follow_the_documented_bytes() -> None:
    def field(data: bytes) -> bytes:
        return struct.pack("<Q", len(data)) + data

    seed = hashlib.sha256(
        field(b"jengine.page.v1") + field(b"2") + field(b"model") + field("säl".encode())
    ).digest()
    first = hashlib.sha256(seed + bytes([1, 0, 0, 0, 0, 1, 0, 0])).digest()
    second = hashlib.sha256(first + bytes([255, 255, 255, 127, 3, 0, 0, 0])).digest()
    tokens = [1, 256, 2**31 - 1, 3]
    assert chain_of(tokens, fingerprint="model", salt="säl") == [seed, first, second]


def test_digests_do_not_vary_between_processes() -> None:
    program = (
        "from tests.core.test_prefix_cache import chain_of;"
        "print(chain_of([5, 6, 7, 8], fingerprint='f', salt='s')[-1].hex())"
    )
    for hash_seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        result = subprocess.run(
            [sys.executable, "-c", program],
            env=env,
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        )
        assert result.stdout.strip() == GOLDEN


def test_digest_names_the_whole_prefix() -> None:
    a = chain_of([1, 2, 3, 4, 5, 6])
    b = chain_of([1, 2, 9, 4, 5, 6])
    assert a[:2] == b[:2]
    assert not set(a[2:]) & set(b[2:])  # page 2 has equal tokens, but another prefix


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"salt": "x"}, {"salt": "y"}),
        ({"fingerprint": "x"}, {"fingerprint": "y"}),
        ({"fingerprint": "ab", "salt": "c"}, {"fingerprint": "a", "salt": "bc"}),
        ({"page_size": 2}, {"page_size": 4}),
    ],
)
def test_chains_of_different_seeds_have_nothing_in_common(a: dict, b: dict) -> None:
    tokens = [1, 2, 3, 4]
    assert not set(chain_of(tokens, **a)) & set(chain_of(tokens, **b))


def test_extending_in_parts_equals_extending_at_once() -> None:
    tokens = list(range(8))
    hasher = PageHasher(2, "")
    chain = hasher.start("")
    for num_pages in (0, 1, 1, 3, 2, 4):
        hasher.extend(chain, tokens, num_pages)
    assert chain == chain_of(tokens)


def test_cache_maps_both_ways() -> None:
    cache = PrefixCache()
    cache.insert(b"a", 1)
    cache.insert(b"b", 2)
    assert (cache.lookup(b"a"), cache.lookup(b"b"), cache.lookup(b"c")) == (1, 2, 0)
    with pytest.raises(IntegrityError):
        cache.insert(b"a", 3)
    with pytest.raises(IntegrityError):
        cache.insert(b"c", 1)
    cache.forget(1)
    assert (cache.lookup(b"a"), cache.pages, len(cache)) == (0, {2}, 1)
    cache.check_integrity()
    cache._page_of[b"a"] = 2
    with pytest.raises(IntegrityError):
        cache.check_integrity()
