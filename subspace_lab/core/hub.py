"""The Hugging Face Hub: a folder up, a folder down."""

from __future__ import annotations

from pathlib import Path


def upload_folder(folder: Path, name: str, *, private: bool = False, token: str | None = None) -> str:
    """Put a folder on the Hub, in a repository that is made if it does not exist; returns the address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(name, private=private, exist_ok=True)
    return str(api.upload_folder(repo_id=name, folder_path=folder))


def local_folder(name: str | Path, what: str, revision: str | None = None) -> Path:
    """The folder of this name, or else the Hub's copy of the repository of this name.

    Args:
        what: what is looked for, for the message of the error.

    Raises:
        FileNotFoundError: neither is there.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(str(name), revision=revision))
    except (HFValidationError, OSError) as error:
        raise FileNotFoundError(f"{name} is neither a folder nor {what} on the Hub: {error}") from error
