"""A model folder in other forms: ONNX files beside it (`kodalle export`), 16-bit weights in a new one (`kodalle convert`)."""

import enum
from pathlib import Path
from typing import Annotated

import typer


def export(
    model: Annotated[Path, typer.Argument(help="model folder", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(help="folder for the files; default: MODEL itself, where drawing finds them", show_default=False),
    ] = None,
) -> None:
    """Writes the VQGAN decoder and KoCLIP as ONNX, compares them with torch, and records which of the two is faster."""
    from engine.codec.onnx_record import RECORD_FILE, export_model
    from engine.models.onnx_export import onnx_file

    folder = model if out is None else out
    record = export_model(model, folder, progress=True)
    for name, file in record.files.items():
        print(f"{onnx_file(folder, name)}  {file.bytes:,} bytes  max abs error against torch {file.max_abs_error:.1e}")
    for device, measured in record.measured.items():
        print(f"{folder / RECORD_FILE}  {device}, {measured.threads} threads: {measured}")


class WeightType(enum.StrEnum):
    """Forms of stored weights; drawing computes in what suits the machine, whatever they are stored in."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


def convert(
    model: Annotated[Path, typer.Argument(help="model folder", show_default=False)],
    out: Annotated[Path, typer.Argument(help="folder for the new one", show_default=False)],
    dtype: Annotated[WeightType, typer.Option(help="what weights are stored in")] = WeightType.FLOAT16,
) -> None:
    """Writes the model once more with weights of another type: half the bytes in 16 bits, pictures that differ a little."""
    import torch

    from engine.models.folder import convert_model_folder

    size = convert_model_folder(model, out, dtype=getattr(torch, dtype))
    print(f"{out}  {size:,} bytes of weights in {dtype}")
