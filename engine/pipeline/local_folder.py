"""Where a model is on this disk: its folder, or the copy of one on the Hugging Face hub. Without torch."""

from pathlib import Path

from engine.errors import InputError
from engine.files import is_hub_name


def local_folder(folder_or_hub_id: str | Path, *, revision: str | None = None, local_files_only: bool = False) -> Path:
    """A model folder as it was named, or the hub's copy of `owner/name` on this disk.

    Raises:
        InputError: the hub has no such model or cannot be reached.
    """
    folder = Path(folder_or_hub_id)
    name = str(folder_or_hub_id)
    if folder.exists() or not is_hub_name(name):
        return folder  # a folder that is missing gets its own error message
    from huggingface_hub import snapshot_download  # a quarter of a second, and folders do not need it
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        fetched = snapshot_download(
            name,
            revision=revision,
            local_files_only=local_files_only,
            allow_patterns=[
                "*.json",
                "*.safetensors",
                "SHA256SUMS",
                "*.txt",
                "*.md",
                "*.onnx",
            ],  # never pickles or code
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError("model", name, f"no such folder, and it cannot be fetched from the hub ({reason})") from error
    return Path(fetched)
