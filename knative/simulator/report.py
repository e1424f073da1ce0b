"""A page that has everything in itself: it can be sent to somebody, and needs no network."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from knative.simulator.errors import SimulatorError
from knative.simulator.plots import png

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #24292f; background: #fff; max-width: 1000px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }
th, td { padding: 3px 10px; text-align: right; border-bottom: 1px solid #d0d7de; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; } ul { padding-left: 1.2rem; } tr.front td { font-weight: 600; }
"""


class ReportError(SimulatorError):
    """A file that cannot be written."""


@dataclass(frozen=True)
class Table:
    """Cells as text; `marked`: rows that stand out."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: frozenset[int] = frozenset()


def page(title: str, notes: Iterable[str], sections: Iterable[tuple[str, Figure | Table]]) -> str:
    """The page. notes: what is to be known before the results are believed."""
    said = "".join(f"<li>{escape(note)}</li>" for note in notes)
    parts = [f"<h2>{escape(heading)}</h2>\n{_html(heading, part)}" for heading, part in sections]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n" + (f"<ul>{said}</ul>\n" if said else "") + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def _html(heading: str, part: Figure | Table) -> str:
    if isinstance(part, Figure):
        return f'<img alt="{escape(heading)}" src="data:image/png;base64,{base64.b64encode(png(part)).decode()}">'
    head = "".join(f"<th>{escape(cell)}</th>" for cell in part.head)
    rows = (
        f"<tr{' class=front' if at in part.marked else ''}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for at, row in enumerate(part.rows)
    )
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def write(path: Path, content: str | bytes) -> None:
    """Write a report or a picture. Raises ReportError."""
    try:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as err:
        raise ReportError(f"{path}: {err.strerror or err}") from None
