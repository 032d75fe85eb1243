"""The tokenizer's files as one zip, for gateways that tokenise themselves."""

import hashlib
import io
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jengine.text.tokenizer import Tokenizer

CHUNK_BYTES = 64 * 1024
FILE_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "config.json",
    "tiktoken.model",
    "vocab.json",
    "merges.txt",
)
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest a zip can say: equal files give equal bytes


@dataclass(frozen=True, slots=True)
class TokenizerBundle:
    """A zip and the hex sha256 of the whole of it."""

    data: bytes
    sha256: str

    def chunks(self) -> Iterator[tuple[bytes, str]]:
        """(bytes, "") and so on; the last piece carries the sha256."""
        for start in range(0, len(self.data), CHUNK_BYTES):
            piece = self.data[start : start + CHUNK_BYTES]
            yield piece, self.sha256 if start + CHUNK_BYTES >= len(self.data) else ""


def build_bundle(tokenizer: "Tokenizer", folder: Path | None) -> TokenizerBundle:
    """Zip `folder`'s tokenizer files; without a folder (GGUF) the tokenizer writes them first.
    Blocks.
    """
    if folder is not None:
        return zip_folder(folder)
    with tempfile.TemporaryDirectory(prefix="jengine-tokenizer-") as scratch:
        tokenizer.save(Path(scratch))
        return zip_folder(Path(scratch))


def zip_folder(folder: Path) -> TokenizerBundle:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(FILE_NAMES):
            if (path := folder / name).is_file():
                info = zipfile.ZipInfo(name, date_time=_EPOCH)
                info.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(info, path.read_bytes())
    data = buffer.getvalue()
    return TokenizerBundle(data, hashlib.sha256(data).hexdigest())
