"""What the reports' pages share: one HTML file each, readable without this program, pictures inside."""

import base64
import html
import io
from pathlib import Path

from PIL import Image

_WIDE = 440  # pixels of a small image on the page
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1f2937; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; } figure { display: inline-block; margin: 0 1rem 1rem 0; }
figcaption { font-size: 13px; color: #4b5563; max-width: 30rem; } img { image-rendering: pixelated; max-width: 100%; }
svg text { font: 11px system-ui, sans-serif; fill: #4b5563; } svg .grid { stroke: #e5e7eb; }
ul.verdicts { list-style: none; padding: 0; } ul.verdicts li { padding: .35rem .7rem; margin: .3rem 0; border-left: 5px solid; }
ul.verdicts .good { border-color: #059669; background: #ecfdf5; }
ul.verdicts .fair { border-color: #d97706; background: #fffbeb; }
ul.verdicts .bad { border-color: #dc2626; background: #fef2f2; }
ul.verdicts .unknown { border-color: #6b7280; background: #f3f4f6; }
pre { background: #f3f4f6; padding: .8rem; white-space: pre-wrap; } table { border-collapse: collapse; }
td { padding: .1rem .8rem .1rem 0; vertical-align: top; } .pair img { width: 112px; margin-right: 4px; } .pair { max-width: 240px; }
table.figures th { text-align: left; font-size: 13px; padding: .1rem .8rem .3rem 0; border-bottom: 2px solid #e5e7eb; vertical-align: bottom; }
table.figures td { border-bottom: 1px solid #f3f4f6; } table.figures .number, table.figures th.number { text-align: right; font-variant-numeric: tabular-nums; }
table.figures .section td { font-weight: 600; padding-top: .8rem; } table.figures small { color: #4b5563; }
"""


def page(title: str, body: str) -> str:
    """A whole document around the HTML of its body."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>{body}</body></html>\n"
    )


def figure(image: Image.Image, caption: str) -> str:
    """Small images are enlarged by a whole number, so that their pixels stay what they are."""
    width = image.width * max(1, _WIDE // image.width)
    return _figure_of(f'<img src="{data_url(image)}" width="{width}" alt="">', caption)


def file_figure(path: Path, caption: str) -> str:
    """A PNG as it lies there."""
    return _figure_of(f'<img src="{_url(path.read_bytes())}" alt="">', caption)


def chart_figure(chart: str, caption: str) -> str:
    """An SVG of engine.training.report.charts; nothing where it is empty."""
    return _figure_of(chart, caption) if chart else ""


def data_url(image: Image.Image) -> str:
    """An image inside the page, as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return _url(buffer.getvalue())


def _figure_of(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
