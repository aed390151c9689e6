"""Where each key of a YAML file stands, and complaints that say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from regraft.engine.errors import ConfigError, nearest

DEEPEST = 20  # sections in each other: far more than there are, and an anchor that refers to itself never ends


def lines_of(node: yaml.Node | None, prefix: tuple = ()) -> dict[tuple, int]:
    found: dict[tuple, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = (*prefix, key.value)
            found[path] = key.start_mark.line + 1
            found.update(lines_of(value, path))
    return found


def refuse_twice(node: yaml.Node | None, path: Path, prefix: str = "") -> None:
    # YAML itself would let the last one win in silence.
    if not isinstance(node, yaml.MappingNode):
        return
    if prefix.count(".") >= DEEPEST:
        line = node.start_mark.line + 1
        raise ConfigError(f"{path}:{line}: more than {DEEPEST} sections in each other, or an anchor within itself")
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.value in seen:
            raise ConfigError(f"{path}:{line}: {prefix}{key.value}: already set in line {seen[key.value]}")
        seen[key.value] = line
        refuse_twice(value, path, f"{prefix}{key.value}.")


def distinct(errors: list[Any]) -> list[Any]:
    # A union that fails gives one error a member; the first tells enough, the others' expectations are joined to it.
    merged: dict[tuple, Any] = {}
    for error in errors:
        loc = tuple(part for part in error["loc"] if not _is_branch(part))
        if loc in merged and error["type"] != "extra_forbidden":
            merged[loc]["msg"] += f"; or {error['msg'][0].lower()}{error['msg'][1:]}"
        else:
            merged[loc] = {**error, "loc": loc}
    return list(merged.values())


def _is_branch(part: str | int) -> bool:
    # pydantic names the member of a union it tried inside the location; no key of ours looks like these.
    return isinstance(part, str) and (
        part in {"int", "str", "float", "bool"} or "[" in part or part.startswith("literal")
    )


def explain(error: Any, root: Any, source: str, lines: dict[tuple, int]) -> str:
    loc = tuple(str(part) for part in error["loc"])
    key = ".".join(loc)
    line = next((lines[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in lines), None)
    place = "--set" if line == 0 else f"{source}:{line}" if line else source
    if error["type"] == "extra_forbidden":
        valid = _fields_at(root, loc[:-1])
        hint = nearest(loc[-1], valid) or f"; valid here: {', '.join(valid)}"
        return f"{place}: {key}: unknown key{hint}"
    if error["type"] == "missing":
        return f"{place}: {key}: missing, and has no default"
    if error["type"] == "value_error":
        message = str(error["ctx"]["error"])
        inner = tuple(message.split(":")[0].split("."))
        full = (*loc, *inner)
        line = next((lines[full[:n]] for n in range(len(full), 0, -1) if full[:n] in lines), line)
        place = "--set" if line == 0 else f"{source}:{line}" if line else source
        return f"{place}: {key + '.' if key else ''}{message}"
    message = error["msg"][0].lower() + error["msg"][1:].replace("Input should", "should")
    message = message.replace("input should", "should")
    if isinstance(error["input"], bool) and "string" in message:
        message += " (YAML reads yes, no, on and off as true and false: put them in quotes)"
    return f"{place}: {key}: {message}, found {error['input']!r}"


def _fields_at(root: Any, loc: tuple) -> list[str]:
    section = root
    for part in loc:
        if get_origin(section) is dict:  # the keys are the user's own
            section = get_args(section)[1]
            continue
        section = section.model_fields[part].annotation
        if not hasattr(section, "model_fields") and get_origin(section) is not dict:
            section = next((a for a in get_args(section) if hasattr(a, "model_fields")), None)
        if section is None:
            return []
    return list(getattr(section, "model_fields", ()))
