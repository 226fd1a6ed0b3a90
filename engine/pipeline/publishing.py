"""A model folder on the Hugging Face hub: `push(folder, "owner/name")`, the counterpart of loading one by that name.

One commit holds the model's files and README.md, the hub's page, which is the folder's card under a header that the hub reads.
Pickles, logs and whatever else lies in the folder stay here. The token is huggingface_hub's own matter: `hf auth login` or
HF_TOKEN; it is in no message and no file.
"""

from pathlib import Path
from typing import get_args

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

from engine.errors import InputError
from engine.files import is_hub_name
from engine.models.folder_config import PartName, has_part, weights_digest

_FILES = ("*.json", "*.safetensors", "*.txt", "*.onnx", "model_card.md", "SHA256SUMS")
_HEADER = "---\nlibrary_name: kodalle-engine\npipeline_tag: text-to-image\ntags: [text-to-image, kodalle]\n---\n\n"
_TOKENS = "https://huggingface.co/settings/tokens"


def push(
    folder: Path, name: str, *, private: bool = True, update: bool = False, token: str | None = None, endpoint: str | None = None
) -> str:  # fmt: skip
    """Uploads a model folder to the hub.

    Args:
        name: `owner/name` of the repository, which is made.
        private: only its owner sees it; of a new repository.
        update: the repository may be there already, and gets another commit.
        token: with the right to write; default: the one that this machine is logged in with.
        endpoint: of the hub; default: HF_ENDPOINT, or https://huggingface.co.

    Returns:
        The address of the commit.

    Raises:
        InputError: no model folder, a name that the hub cannot have, no token or one that is refused, a repository that is
            there already, or a hub that cannot be reached.
    """
    files = model_files(folder)
    if not is_hub_name(name):
        raise InputError("name", name, "give owner/name, as the hub has them, e.g. my-company/clothes")
    token = token or get_token()
    if not token:
        raise InputError("token", "(none)", f"log in with `hf auth login`, or set HF_TOKEN; make one at {_TOKENS}")
    api = HfApi(endpoint=endpoint, token=token)
    card = (folder / "model_card.md").read_text(encoding="utf-8") if (folder / "model_card.md").is_file() else ""
    operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
    operations.append(CommitOperationAdd("README.md", (_HEADER + card).encode()))
    try:
        api.create_repo(name, private=private, exist_ok=update)
        commit = api.create_commit(name, operations, commit_message="Upload a model trained with KoDALLE engine")
    except HFValidationError as error:
        raise InputError("name", name, "give owner/name of letters, digits, -, _ and ., as the hub has them") from error
    except HfHubHTTPError as error:
        raise _refused(name, error.response.status_code) from error
    except (OfflineModeIsEnabled, ConnectionError, HTTPError) as error:
        remedy = "the hub cannot be reached: look at the network (and HF_HUB_OFFLINE), then run the same command again"
        raise InputError("hub", api.endpoint, remedy) from error
    return str(commit.commit_url)


def model_files(folder: Path) -> list[Path]:
    """What is uploaded of a model folder, sorted.

    Raises:
        InputError: not a model folder, or one with a part that is missing or damaged.
    """
    held = [part for part in get_args(PartName) if folder.is_dir() and has_part(folder, part)]
    if not held:
        raise InputError("FOLDER", folder, "is no model folder: give one that training exported, e.g. runs/mine/model")
    for part in held:
        weights_digest(folder, part)  # raises for a file that is missing
    return sorted({path for pattern in _FILES for path in folder.glob(pattern) if path.is_file()})


def _refused(name: str, status: int) -> InputError:
    """What the hub's answer means; its own text is not repeated, since it may quote the request."""
    if status == 401:
        return InputError("token", "(not shown)", f"the hub refuses it: make one with the right to write at {_TOKENS}")
    if status == 403:
        return InputError(
            "token", "(not shown)", f"has no right to write to {name}: take another token, or another owner"
        )
    if status == 409:
        return InputError("name", name, "is there already: choose another name, or add --update for one more commit")
    return InputError(
        "hub", f"status {status}", "nothing of this commit is there: run the same command again, with --update"
    )
