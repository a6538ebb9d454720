"""Uploading and downloading folders from the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path


def upload_folder(folder: Path, name: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload a folder to a repository on the Hub, which is created if it does not exist; returns the address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(name, private=private, exist_ok=True)
    return str(api.upload_folder(repo_id=name, folder_path=folder))


def local_folder(name: str | Path, what: str, revision: str | None = None) -> Path:
    """The local folder of this name, or, if there is none, a copy of the Hub's repository of this name.

    Args:
        what: what is being looked for, for error messages.

    Raises:
        FileNotFoundError: neither exists.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(str(name), revision=revision))
    except (HFValidationError, OSError) as error:
        raise FileNotFoundError(f"{name} is neither a folder nor {what} on the Hub: {error}") from error
