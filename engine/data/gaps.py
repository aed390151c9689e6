"""What becomes of rows whose text or label is missing or blank: an error that names them, or a counted rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from regraft.engine.config import DataConfig
from regraft.engine.data.cells import Absent, Cells
from regraft.engine.errors import DataError, at


class TextRow(NamedTuple):
    """One row; `line` is 1-based, `pair` and `label` are None where the source has none."""

    line: int
    text: str
    pair: str | None
    label: Any


def fill_or_drop(
    cells: Iterator[Cells],
    path: str,
    data: DataConfig,
    *,
    task_type: str | None,
    need_labels: bool,
    dropped: dict[str, int],
) -> Iterator[TextRow]:
    """Rows that can be used. Those left out by `data.missing` or `data.empty` are counted in `dropped` by rule.

    Raises DataError naming line and column where the rule is 'error', or a cell holds what no rule can mend.
    """
    columns = data.columns
    rules = {"missing": data.missing, "empty": data.empty}
    read_label = label_reader(task_type, data.label_separator)
    column: str | int = columns.text
    for line, text, pair, label in cells:
        try:
            column = columns.text
            text = _text(text, data.empty)
            if columns.text_pair is not None:
                column = columns.text_pair
                pair = _text(pair, data.empty)
            column = columns.label
            label = None if isinstance(label, Absent) and not need_labels else read_label(label)
            if label is None and need_labels:
                raise _Gap("missing", "is empty")
        except _Gap as gap:
            if rules[gap.rule] == "error":
                raise DataError(
                    _explain(at(path, line, column), gap, "label" if column == columns.label else "text")
                ) from None
            dropped[gap.rule] = dropped.get(gap.rule, 0) + 1
        except ValueError as error:
            raise DataError(f"{at(path, line, column)}: {error}") from None
        else:
            yield TextRow(line, text, pair, label)


def label_reader(task_type: str | None, separator: str) -> Callable[[Any], Any]:
    """What turns a label cell into a label: str, int, float or bool; for 'multilabel' a list of them; None if it is
    missing. For None as task type: the cell as it is.

    The function raises ValueError at what cannot be a label of the task.
    """

    def multilabel(cell: Any) -> Any:
        if isinstance(cell, str):  # no text is no label, which is a fact about the row and not a gap
            return [part for piece in cell.split(separator) if (part := piece.strip())]
        if isinstance(cell, list | tuple):
            return [_one_of_many(value) for value in cell]
        found = _single(cell)
        return None if found is None else [found]

    return {None: lambda cell: cell, "multilabel": multilabel}.get(task_type, _single)


class _Gap(Exception):
    def __init__(self, rule: str, problem: str) -> None:
        super().__init__(problem)
        self.rule = rule


def _explain(place: str, gap: _Gap, what: str) -> str:
    rule = f"drop to leave such rows out (they are counted){', or keep' if gap.rule == 'empty' else ''}"
    return f"{place}: the {what} {gap}; set data.{gap.rule}: {rule}"


def _text(cell: Any, empty: str) -> str:
    if type(cell) is not str:
        cell = _text_of(cell)
    if (not cell or cell.isspace()) and empty != "keep":
        raise _Gap("empty", "is blank" if cell else "is empty")
    return cell


def _text_of(cell: Any) -> str:
    if isinstance(cell, Absent):
        raise _Gap("missing", cell.told)
    if cell is None or cell != cell:  # not a number, as pandas writes gaps
        raise _Gap("missing", "is missing (null)")
    if isinstance(cell, list | tuple | dict | set | bytes):
        raise ValueError(f"expected a text, found {_kind(cell)}")
    return str(cell).lower() if isinstance(cell, bool) else str(cell)


def _single(cell: Any) -> Any:
    if isinstance(cell, str):
        return None if not cell or cell.isspace() else cell
    if isinstance(cell, Absent):
        raise _Gap("missing", cell.told)
    if cell is None or cell != cell:
        return None
    if isinstance(cell, int | float):  # bool too
        return cell
    if isinstance(cell, list | tuple | dict | set | bytes):
        hint = "; for several labels a row set task.type: multilabel" if isinstance(cell, list | tuple) else ""
        raise ValueError(f"expected one label, found {_kind(cell)}{hint}")
    return str(cell)


def _one_of_many(cell: Any) -> Any:
    found = None if isinstance(cell, list | tuple) else _single(cell)
    if found is None:
        raise ValueError(f"expected a list of labels, found {_kind(cell)} in it")
    return found


def _kind(cell: Any) -> str:
    if cell is None or cell == "":
        return "an empty value"
    kinds: dict[type, str] = {list: "a list", tuple: "a list", dict: "an object", bytes: "bytes"}
    return kinds.get(type(cell), repr(cell))
