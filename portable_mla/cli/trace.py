"""TraceRequest: one request of a serving trace, and the strict reader of trace files."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SHIPPED_TRACE = Path(__file__).parent / "data" / "azure_conversations.csv"

# Column -> (least, most). The bounds keep a damaged file from asking for more memory than any machine has.
COLUMNS = {
    "arrival_ms": (0, 10**12),
    "input_tokens": (1, 10**7),
    "output_tokens": (1, 10**7),
}
_INTEGER = re.compile(r"[+-]?[0-9]{1,20}")


@dataclass(frozen=True)
class TraceRequest:
    """When a request arrives, how long its prompt is, and how many tokens it generates."""

    arrival_ms: int
    input_tokens: int
    output_tokens: int

    @property
    def total_tokens(self) -> int:
        """Tokens in the cache when the request has finished."""
        return self.input_tokens + self.output_tokens


class TraceError(ValueError):
    """A trace file is malformed: names the file, the line and the column, what is allowed and what was found."""

    def __init__(self, path: Path, line: int, column: str, expected: str, got: str) -> None:
        super().__init__(f"{path}: line {line}: column {column}: expected {expected}, got {got}")
        self.path, self.line, self.column = path, line, column


def read_trace(path: Path) -> tuple[TraceRequest, ...]:
    """The requests of a CSV file with the columns arrival_ms, input_tokens and output_tokens, by arrival.

    Other columns and blank lines are skipped. Raises TraceError for a malformed file and OSError for one that cannot
    be read.
    """
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.reader(file)
        try:
            header = [name.strip() for name in next(reader, [])]
            _check_header(path, header)
            requests = [_request(path, reader.line_num, header, cells) for cells in reader if cells]
        except csv.Error as error:
            raise TraceError(path, reader.line_num, next(iter(COLUMNS)), "comma-separated text", str(error)) from error
    if not requests:
        raise TraceError(path, 2, next(iter(COLUMNS)), "at least one request", "the end of the file")
    return tuple(sorted(requests, key=lambda request: request.arrival_ms))


def _check_header(path: Path, header: Sequence[str]) -> None:
    for column in COLUMNS:
        if header.count(column) != 1:
            got = f"the header {','.join(header)!r}" if header else "an empty line or file"
            raise TraceError(path, 1, column, f"a header that names {', '.join(COLUMNS)} once each", got)


def _request(path: Path, line: int, header: Sequence[str], cells: Sequence[str]) -> TraceRequest:
    if len(cells) != len(header):
        missing = header[len(cells)] if len(cells) < len(header) else str(len(header) + 1)
        raise TraceError(path, line, missing, f"{len(header)} cells as in the header", f"{len(cells)}")
    row = dict(zip(header, cells, strict=True))
    return TraceRequest(**{column: _integer(path, line, column, row[column]) for column in COLUMNS})


def _integer(path: Path, line: int, column: str, cell: str) -> int:
    least, most = COLUMNS[column]
    text = cell.strip()
    if not _INTEGER.fullmatch(text) or not least <= int(text) <= most:
        raise TraceError(path, line, column, f"an integer from {least} to {most}", repr(cell))
    return int(text)
