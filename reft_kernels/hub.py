"""Adapters on the Hugging Face hub: a folder from it, and a folder to it."""

from __future__ import annotations

import os
from pathlib import Path

_ADAPTER_PATTERNS = ["*.json", "*.bin", "*.safetensors"]

# What only an adapter has: of an older one in another format, which would be read instead of the new one.
_STALE_PATTERNS = [
    "reft_config.json", "adapter.safetensors", "base_trainable.safetensors", "reft_kernels.json", "intkey_*.bin",
    "adapter_config.json", "pytorch_adapter.bin",
]  # fmt: skip


def local_folder(
    load_directory: str | os.PathLike[str],
    local_directory: str | os.PathLike[str] | None = None,
    from_huggingface_hub: bool = False,
) -> Path:
    """The folder itself, or the one that a repository of the hub was downloaded to.

    Args:
        load_directory: a folder; or a repository such as "owner/name", where there is no such folder or
            ``from_huggingface_hub`` says so.
        local_directory: where to put the repository's files; None: into the hub's own cache.
        from_huggingface_hub: whether ``load_directory`` is a repository although a folder has that name.

    Raises FileNotFoundError where it is neither.
    """
    if not from_huggingface_hub:
        if os.path.exists(load_directory):
            return Path(load_directory)
        name = os.fspath(load_directory)
        if not isinstance(load_directory, str) or name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise FileNotFoundError(f"{name}: no such folder, nor the name of a repository such as 'owner/name'")
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            repo_id=os.fspath(load_directory),
            local_dir=None if local_directory is None else os.fspath(local_directory),
            allow_patterns=_ADAPTER_PATTERNS,
        )
    except Exception as error:  # the hub has many errors of its own, and those of its connection
        what = "" if from_huggingface_hub else "no such folder, and "
        raise FileNotFoundError(f"{os.fspath(load_directory)}: {what}not to be had from the hub: {error}") from error
    return Path(found)


def upload_folder(folder: str | os.PathLike[str], repository: str) -> None:
    """Put a folder's files into a repository of the hub, which is made where it is missing, in one commit."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.upload_folder(
        repo_id=api.create_repo(repository, exist_ok=True).repo_id,
        folder_path=os.fspath(folder),
        commit_message="Upload a ReFT adapter",
        delete_patterns=_STALE_PATTERNS,
    )
