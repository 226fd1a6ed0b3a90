"""Figures as text: columns, units."""

from collections.abc import Sequence

NOT_MEASURED = "not measured"


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the first and the last are flush left, the others right."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if number in (0, len(row) - 1) else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    ]
    return "\n".join([title, *lines])


def seconds_text(seconds: float | None) -> str:
    """Three digits, with the unit: 0.00123 -> `1.23 ms`."""
    if seconds is None:
        return "-"
    if seconds >= 1000:
        return f"{seconds:,.0f} s"
    value, unit = (seconds, "s") if seconds >= 1 else (1e3 * seconds, "ms")
    return f"{value:#.3g}".rstrip(".") + f" {unit}"
