"""Weights with their card to a repository of the Hugging Face Hub, or to a folder like one: `mixlab push`."""

import re
import tempfile
from pathlib import Path
from typing import Any

from mixlab.checkpoint.convert import convert
from mixlab.checkpoint.store import Weights
from mixlab.data.images.preprocess import ImagePreprocess
from mixlab.errors import MixlabError, UsageError
from mixlab.files import write_atomically, written_whole
from mixlab.models.catalog import MIXER, family_of


def write_repository(
    weights: Weights, folder: Path, card: str, *, format: str | None = None
) -> dict[str, Any]:
    """A folder as a Hub repository has it: weights, config.json, README.md. What `mixlab push --json` prints.

    format: of `convert`, that makes folders; None takes mixlab-timm for a plain Mixer of images, which timm loads
    once mixlab is installed, and mixlab for others.
    """
    if folder.exists():
        raise UsageError("it exists already", where=str(folder), hint="choose another --folder")
    is_plain = family_of(weights.model, exactly=True) is MIXER and isinstance(
        weights.preprocess, ImagePreprocess
    )
    format = format or ("mixlab-timm" if is_plain else "mixlab")
    if format not in ("mixlab", "mixlab-timm", "timm"):
        raise UsageError(f"{format} is no folder", where="--format", hint="mixlab, mixlab-timm or timm")
    with written_whole(folder) as temporary:
        result = convert(weights, temporary, format=format)
        write_atomically(temporary / "README.md", card.encode())
        files = sorted(path.name for path in temporary.iterdir())
    return {"folder": str(folder), "format": format, "files": files, "read_back": result["read_back"]}


def push(
    weights: Weights, repository: str, card: str, *, format: str | None = None, private: bool = False
) -> dict[str, Any]:
    """Upload what `write_repository` writes to `repository`, OWNER/NAME, which is made if it is not there.

    MixlabError says what the Hub answered. The person is who `hf auth login`, or HF_TOKEN, says.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", repository):
        raise UsageError(f"{repository!r} is no OWNER/NAME", where="REPO", hint="such as me/my-mixer")
    import huggingface_hub

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "repository"
        result = write_repository(weights, folder, card, format=format)
        api = huggingface_hub.HfApi()
        try:
            url = api.create_repo(repository, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message="Weights and card, by mixlab"
            )
        except Exception as error:  # of its own, of the network library beneath: many kinds
            raise MixlabError(
                f"the Hub did not take it: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
                where=repository,
                hint="`hf auth login` first; --folder writes the same files here",
            ) from error
    return result | {
        "folder": None,
        "repository": repository,
        "url": str(url),
        "commit": getattr(commit, "oid", None),
    }
