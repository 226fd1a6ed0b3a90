"""`kodalle import`: a checkpoint of another project to a model folder."""

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from engine.commands.heavy_imports import heavy_imports
from engine.errors import InputError
from engine.files import check_folder_place

if TYPE_CHECKING:
    from engine.interop.importing import Kind as KnownKind


class Kind(enum.StrEnum):
    """What a source can be stated to be (engine/interop/importing.py)."""

    AUTO = "auto"
    KODALLE = "kodalle"
    DALLE = "dalle"
    MINDALLE = "mindalle"
    VQGAN = "vqgan"
    DISCRETE_VAE = "discrete-vae"
    OPENAI_DVAE = "openai-dvae"
    KOCLIP = "koclip"
    CLIP = "clip"


def import_(
    source: Annotated[Path, typer.Argument(help="checkpoint of another project, or its folder", show_default=False)],
    destination: Annotated[Path, typer.Argument(help="folder for the model", show_default=False)],
    kind: Annotated[Kind, typer.Option(help="what the source must be; auto: whatever its content shows")] = Kind.AUTO,
    config: Annotated[
        Path | None,
        typer.Option(help="yaml of a taming or minDALL-E model; default: the one beside it", show_default=False),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="folder or hub name of a transformer's tokenizer", show_default=False)
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="pixels, for codecs whose files do not state it", min=1, show_default=False)
    ] = None,
) -> None:
    """Writes a model folder from a checkpoint of taming, DALLE-pytorch, minDALL-E, OpenAI or KoDALLE. Runs nothing that is in it."""
    if not source.exists():
        raise InputError("source", source, "no such file or folder")
    check_folder_place(destination, field="destination", holds="config.json", what="a model")
    with heavy_imports():
        from engine.interop.importing import ImportOptions, import_checkpoint

    found = import_checkpoint(
        source,
        destination,
        kind=cast("KnownKind | None", None if kind is Kind.AUTO else kind.value),
        options=ImportOptions(config, image_size, tokenizer),
    )
    weights = [weight for part in found.parts.values() for weight in part.weights.values()]
    parameters = sum(weight.numel for weight in weights if weight.dtype.is_floating_point)
    print(f"{destination}  {found.name}, {parameters:,} parameters")
    for note in found.notes:
        print(f"note: {note}")
