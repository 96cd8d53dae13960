"""Reading JSON objects and YAML configurations field by field: errors say what, where and what was needed."""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from nesa_ray.errors import InvalidConfig, InvalidInput

T = TypeVar("T")


class Fields:
    """One JSON object being read.

    `where` names the object in errors ("node 3"); `error` is the exception class to raise.
    """

    def __init__(self, value: Any, where: str, error: type[InvalidInput]) -> None:
        if not isinstance(value, Mapping):
            raise error(f"{where}: needs a JSON object, got {_show(value)}")
        self.value, self.where, self.error = value, where, error

    def fail(self, field: str, message: str) -> InvalidInput:
        """The error to raise about one field."""
        return self.error(f"{self.where}: {field}: {message}")

    def only(self, known: Iterable[str]) -> None:
        """Refuses unknown fields, naming the nearest known one."""
        names = list(known)
        for key in self.value:
            if key not in names:
                raise self.fail(str(key), f"unknown field{nearest(str(key), names)}")

    def number(self, field: str, default: float | None = None, *, positive: bool = False) -> float:
        """A finite number ≥ 0 (> 0 if `positive`); required unless there is a default."""
        if field not in self.value:
            if default is None:
                raise self.fail(field, "missing, needs a number")
            return default
        return self._check_number(field, self.value[field], positive)

    def numbers(self, field: str) -> dict[str, float]:
        """An object of numbers ≥ 0, empty when absent."""
        value = self.value.get(field)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise self.fail(field, f"needs an object of numbers, got {_show(value)}")
        return {str(k): self._check_number(f"{field}.{k}", v, False) for k, v in value.items()}

    def _check_number(self, field: str, value: Any, positive: bool) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(field, f"needs a number, got {_show(value)}")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number) or number < 0 or (positive and number == 0):
            bound = "> 0" if positive else "≥ 0"
            raise self.fail(field, f"needs a finite number {bound}, got {_show(value)}")
        return number

    def text(self, field: str, default: str | None = None) -> str:
        """A string; required unless there is a default."""
        value = self.value.get(field, default)
        if not isinstance(value, str):
            raise self.fail(
                field, "missing, needs a string" if value is None else f"needs a string, got {_show(value)}"
            )
        return value

    def flag(self, field: str, default: bool = False) -> bool:
        """true or false."""
        value = self.value.get(field, default)
        if not isinstance(value, bool):
            raise self.fail(field, f"needs true or false, got {_show(value)}")
        return value

    def items(self, field: str, *, required: bool = True) -> list[Any]:
        """A list; empty when absent and not required."""
        value = self.value.get(field, None if required else [])
        if not isinstance(value, list | tuple):
            raise self.fail(field, "missing, needs a list" if value is None else f"needs a list, got {_show(value)}")
        return list(value)

    def identifier(self, field: str = "id") -> int | str:
        """An integer or a string."""
        value = self.value.get(field)
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise self.fail(field, f"needs an integer or a string, got {_show(value)}")
        return value


def nearest(name: str, known: Iterable[str]) -> str:
    """' (did you mean …?)', or nothing when no known name is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def read_json(path: str | Path, error: type[InvalidInput]) -> Any:
    """The parsed JSON file; a file that is missing or isn't JSON raises `error` naming the place."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
        raise error(f"{path}: can't be read: {reason}") from None
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as e:
        raise error(f"{path}: not JSON: {e}") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises InvalidConfig naming the place."""
    try:
        value = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
        raise InvalidConfig(f"{path}: can't be read: {reason}") from None
    except yaml.YAMLError as e:
        raise InvalidConfig(f"{path}: not YAML: {' '.join(str(e).split())}") from None
    if not isinstance(value, Mapping):
        raise InvalidConfig(f"{path}: needs a mapping of keys to values, got {_show(value)}")
    return dict(value)


def read_dataclass(cls: type[T], value: Any, where: str) -> T:
    """A dataclass from a mapping, nested ones too: unknown and missing keys and wrong types raise InvalidConfig.

    Understands int, float, str, bool, X | None, tuple[X, ...] and dataclasses; limits are for __post_init__ to check.
    """
    known = Fields(value, where, InvalidConfig)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    known.only(fields)
    hints = typing.get_type_hints(cls)
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in known.value:
            raise known.fail(name, f"missing, needs {_kind(hints[name])}")
    return cls(**{str(n): _convert(hints[str(n)], v, known, str(n)) for n, v in known.value.items()})


def _convert(hint: Any, value: Any, known: Fields, field: str) -> Any:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        (hint,) = [a for a in arguments if a is not type(None)]
        return _convert(hint, value, known, field)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return read_dataclass(hint, value, f"{known.where}.{field}")
    if typing.get_origin(hint) is tuple:
        values = [value] if not isinstance(value, list | tuple) else value
        return tuple(_convert(arguments[0], v, known, field) for v in values)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and number and math.isfinite(value):
        return float(value)
    if (hint is int and number and isinstance(value, int)) or (hint is not float and type(value) is hint):
        return value
    raise known.fail(field, f"needs {_kind(hint)}, got {_show(value)}")


def _kind(hint: Any) -> str:
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    return names.get(hint, "a mapping" if dataclasses.is_dataclass(hint) else "a value")


def write_json(path: str | Path, value: Any) -> None:
    """Writes the file whole or not at all."""
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(target)


def _show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def is_function(ref: str | Path) -> bool:
    """Whether a model's reference is `package.module:function`, and not a file."""
    text = str(ref)
    return ":" in text and not Path(text).exists()
