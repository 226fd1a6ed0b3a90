"""The OpenAPI document as an HTML page without scripts or external resources."""

import html
from typing import Any

from serve.api.json_schema import Json


def described_page(document: Json) -> str:
    """The document as HTML without scripts or style sheets, which works offline and under the security policy."""
    parts = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>")
            parts.append(f"<p>{html.escape(operation['summary'])}</p>")
            for media_type, content in operation.get("requestBody", {}).get("content", {}).items():
                name = content["schema"]["$ref"].rpartition("/")[2]
                parts.append(
                    f"<h3><code>{media_type}</code></h3>{_fields_table(document['components']['schemas'][name])}"
                )
            rows = [(status, answer["description"]) for status, answer in operation["responses"].items()]
            parts.append(_table(("status", "answer or error codes"), rows))
    title = html.escape(document["info"]["title"])
    # Without an icon of its own a browser asks for /favicon.ico, which behind a proxy may be another server's.
    icon = '<link rel="icon" href="data:,">'
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title} API</title>{icon}</head><body>'
        f"<h1>{title} API</h1><p>{html.escape(document['info']['description'])} "
        f'The same for programs: <a href="openapi.json">openapi.json</a>.</p>{"".join(parts)}</body></html>'
    )


def _fields_table(schema: Json) -> str:
    rows = []
    for name, field in schema["properties"].items():
        choices = field.get("anyOf", [field])
        values = " or ".join(filter(None, map(_values, choices)))
        needed = "required" if name in schema.get("required", ()) else ""
        rows.append((name, needed, values, field.get("description", "")))
    return _table(("field", "", "values", ""), rows)


def _values(choice: Json) -> str:
    if "enum" in choice:
        return ", ".join(str(value) for value in choice["enum"] if value is not None)
    if "minimum" in choice:
        most = f"to {choice['maximum']:,}" if "maximum" in choice else "or more"
        return f"{choice['type']} {choice['minimum']:,} {most}"
    return "" if choice.get("type") == "null" else str(choice.get("format", choice.get("type", "")))


def _table(heads: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    def row(cells: tuple[Any, ...], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(str(cell))}</{tag}>' for cell in cells)}</tr>"

    return f"<table>{row(heads, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>"
