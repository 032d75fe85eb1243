"""Names for the content of full pages, and where each content is found.

The digest of a page names its tokens and every token before them:

    digest[-1] = sha256(version, page size, fingerprint, salt)      the seed of the chain
    digest[i]  = sha256(digest[i - 1], tokens of page i as little-endian int32)

Nothing in it depends on the process, its hash seed or the machine's byte order, so digests written
to disk or sent to another host stay valid. sha256, because a collision would hand one client's
context to another; it costs about 1 us a page.
"""

import struct
from collections.abc import Sequence
from hashlib import sha256

from jengine.core.page_pool import NULL_PAGE, IntegrityError

VERSION = b"jengine.page.v1"


class PageHasher:
    """Digest chains of one engine. `fingerprint` names the model and the layout of its pages."""

    def __init__(self, page_size: int, fingerprint: str) -> None:
        self._page_size = page_size
        self._pack = struct.Struct(f"<{page_size}i").pack
        self._fingerprint = fingerprint

    def start(self, cache_salt: str) -> list[bytes]:
        """A chain without pages: the seed only. Requests with different salts never share pages."""
        fields = (VERSION, b"%d" % self._page_size, self._fingerprint.encode(), cache_salt.encode())
        # Each field with its length: ("ab", "c") and ("a", "bc") must not give one seed.
        seed = sha256(b"".join(struct.pack("<Q", len(field)) + field for field in fields))
        return [seed.digest()]

    def extend(self, chain: list[bytes], token_ids: Sequence[int], num_pages: int) -> None:
        """Append the missing digests of the first `num_pages` pages: `chain[i + 1]` is page i's."""
        size = self._page_size
        for index in range(len(chain) - 1, num_pages):
            tokens = self._pack(*token_ids[index * size : (index + 1) * size])
            chain.append(sha256(chain[-1] + tokens).digest())


class PrefixCache:
    """Where the content of each digest is found in one KV group: at most one page for a digest."""

    def __init__(self) -> None:
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._page_of)

    def lookup(self, digest: bytes) -> int:
        """The page that holds this content, or the null page."""
        return self._page_of.get(digest, NULL_PAGE)

    def insert(self, digest: bytes, page: int) -> None:
        if digest in self._page_of or page in self._digest_of:
            raise IntegrityError(f"page {page} or its content is cached already")
        self._page_of[digest] = page
        self._digest_of[page] = digest

    def forget(self, page: int) -> None:
        del self._page_of[self._digest_of.pop(page)]

    @property
    def pages(self) -> set[int]:
        return set(self._digest_of)

    def check_integrity(self) -> None:
        if {page: digest for digest, page in self._page_of.items()} != self._digest_of:
            raise IntegrityError("the two directions of the prefix cache differ")
