"""`kodalle push`: a model folder to the Hugging Face hub."""

from pathlib import Path
from typing import Annotated

import typer


def push(
    folder: Annotated[Path, typer.Argument(help="model folder", show_default=False)],
    name: Annotated[str, typer.Argument(help="owner/name on the hub", show_default=False)],
    public: Annotated[bool, typer.Option("--public", help="everyone may see it; default: its owner alone")] = False,
    update: Annotated[bool, typer.Option("--update", help="the repository is there already: one more commit")] = False,
) -> None:
    """Uploads a model with its card to the Hugging Face hub, privately unless --public; log in with `hf auth login`."""
    from engine.pipeline.publishing import push as push_folder

    print(push_folder(folder, name, private=not public, update=update))
    print(f'kodalle generate {name} "a caption"')
