"""Section: a titled list of facts, shown as a table on a terminal and as plain lines elsewhere; and clean refusals."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from portable_mla.errors import CacheFull, NoBackend

FAILED, MISUSED = 1, 2  # exit codes: nothing serves or a result is wrong; an argument is wrong

_STYLES = {
    "chosen": "bold green",
    "passed": "bold green",
    "installed": "green",
    "available": "green",
    "missing": "dim",
    "unrelated": "yellow",
    "unavailable": "yellow",
    "refused": "yellow",
    "broken": "bold red",
    "invalid": "bold red",
    "FAILED": "bold red",
}


@dataclass(frozen=True)
class Section:
    """Facts under a title. The first cell of a row names it; empty cells are left out of plain lines."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def plain(self) -> str:
        """The section as lines that read well in a log."""
        return "\n".join([self.title, *(f"  {row[0]}: {self._facts(row)}" for row in self.rows)])

    def table(self) -> Table:
        """The section as a table; cells are text, never markup."""
        table = Table(title=Text(self.title), title_justify="left", title_style="bold")
        for column in self.columns:
            table.add_column(column, overflow="fold")
        for row in self.rows:
            table.add_row(*(Text(cell, style=_style(cell)) for cell in row))
        return table

    def _facts(self, row: tuple[str, ...]) -> str:
        if len(self.columns) == 2:
            return row[1]
        return ", ".join(f"{column} {cell}" for column, cell in zip(self.columns[1:], row[1:], strict=True) if cell)


def show(*sections: Section) -> None:
    """Print sections: tables where a person looks, plain lines where a program does."""
    console = Console()
    for section in sections:
        if console.is_terminal:
            console.print(section.table())
        else:
            print(section.plain())


def show_json(values: Mapping[str, object]) -> None:
    """Print one JSON object."""
    print(json.dumps(values, indent=2, allow_nan=False))


@contextmanager
def clear_refusals(*, as_json: bool) -> Iterator[None]:
    """Turn a refusal inside the block into its message and an exit code: 1 nothing serves, 2 an argument is wrong."""
    try:
        yield
    except (NoBackend, CacheFull) as refusal:
        _stop(refusal, FAILED, as_json=as_json)
    except (ValueError, TypeError, OSError, ImportError) as refusal:
        _stop(refusal, MISUSED, as_json=as_json)


def _stop(refusal: Exception, code: int, *, as_json: bool) -> None:
    if as_json:
        show_json({"error": str(refusal), "kind": type(refusal).__name__})
    else:
        print(f"{type(refusal).__name__}: {refusal}" if code == FAILED else f"error: {refusal}", file=sys.stderr)
    raise typer.Exit(code) from refusal


def _style(cell: str) -> str:
    return next((style for prefix, style in _STYLES.items() if cell.startswith(prefix)), "")
