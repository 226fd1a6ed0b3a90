"""`kodalle export`: a model folder's VQGAN decoder and KoCLIP as ONNX files, compared with torch and measured."""

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
