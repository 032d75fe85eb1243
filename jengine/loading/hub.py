"""Models by Hub id, through huggingface_hub and its cache."""

import re
from pathlib import Path

from jengine.config import is_hub_offline
from jengine.errors import ModelNotFoundError

# What an engine reads. Not *.bin (pickle), not the second copy some repositories hold under
# original/.
CONFIG_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
WEIGHT_FILES = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
CONNECT_SECONDS = 5.0  # then the cache, or an error: nobody waits minutes to learn of a typo
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_hub_id(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None


def fetch_from_hub(
    model_id: str, revision: str | None = None, *, needs_weights: bool = True
) -> Path:
    """The model's folder in the Hub cache, downloaded if it is not there. Raises
    `ModelNotFoundError`.
    """
    # Imported here: 0.4 s that local models need not pay.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    offline = is_hub_offline()
    try:
        folder = snapshot_download(
            model_id,
            revision=revision,
            allow_patterns=[*CONFIG_FILES, *(WEIGHT_FILES if needs_weights else ())],
            etag_timeout=CONNECT_SECONDS,
            local_files_only=offline,
        )
    except GatedRepoError as error:
        raise ModelNotFoundError(
            f"{model_id}: access to it is restricted; accept its terms on the Hub and set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFoundError(f"{model_id} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"{model_id} is no local path, and the Hub has no such model"
        ) from error
    except LocalEntryNotFoundError as error:
        reason = "HF_HUB_OFFLINE is set" if offline else "the Hub cannot be reached"
        raise ModelNotFoundError(
            f"{model_id} is no local path, is not in the Hub cache, and {reason}"
        ) from error
    except (HFValidationError, OSError) as error:  # OSError: every other failure of HTTP or disk
        raise ModelNotFoundError(f"{model_id} cannot be fetched from the Hub: {error}") from error
    if not (Path(folder) / "config.json").is_file():
        raise ModelNotFoundError(
            f"{model_id} holds no config.json: not a model this engine can read"
        )
    return Path(folder)
