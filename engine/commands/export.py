"""A model folder in other forms: ONNX files beside it (`kodalle export`), 16-bit weights in a new one (`kodalle convert`)."""

import enum
from pathlib import Path
from typing import Annotated

import typer

from engine.commands.argument_checks import check_model, check_out_folder
from engine.commands.heavy_imports import heavy_imports
from engine.errors import InputError
from engine.files import check_folder_place


def export(
    model: Annotated[Path, typer.Argument(help="model folder", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(help='folder for the files; default: MODEL itself, for codec_backend="onnx"', show_default=False),
    ] = None,
) -> None:
    """Writes the VQGAN decoder and KoCLIP as ONNX files, compares them with torch, and prints the time of each."""
    folder = model if out is None else out
    check_model(model)
    check_out_folder(folder)
    with heavy_imports():
        from engine.codec.onnx_backend import onnx_file
        from engine.codec.onnx_export import export_model

    report = export_model(model, folder, progress=True)
    for name, file in report.files.items():
        print(f"{onnx_file(folder, name)}  {file.bytes:,} bytes  max abs error against torch {file.max_abs_error:.1e}")
    for device, measured in report.measured.items():
        print(f"{device}, {measured.threads} threads: {measured}")


class WeightType(enum.StrEnum):
    """Number types of stored weights; the pipeline computes in what suits the machine, whatever they are stored in."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


def convert(
    model: Annotated[Path, typer.Argument(help="model folder", show_default=False)],
    out: Annotated[Path, typer.Argument(help="folder for the new one", show_default=False)],
    dtype: Annotated[WeightType, typer.Option(help="what weights are stored in")] = WeightType.FLOAT16,
) -> None:
    """Writes a copy of the model with weights of another type: half the bytes in 16 bits, slightly different images."""
    check_model(model)
    if out.resolve() == model.resolve():
        raise InputError("destination", out, "is the model itself: give another folder")
    check_folder_place(out, field="destination", holds="config.json", what="a model")
    with heavy_imports():
        import torch

        from engine.models.folder import convert_model_folder

    size = convert_model_folder(model, out, dtype=getattr(torch, dtype))
    print(f"{out}  {size:,} bytes of weights in {dtype}")
