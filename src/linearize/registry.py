"""Tables of names that other packages extend: literal entries, `register`, and entry points, which are loaded lazily.

An entry point names an object of an installed package; nothing that comes with a model's folder is ever run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any, TypeVar, Union

from pydantic import BaseModel, Field, SerializeAsAny, TypeAdapter, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticKnownError

from linearize.errors import InputError, one_line

Entry = TypeVar("Entry")
_OWN_NAME = "linearize.registry"  # a copy of this file in a model's folder has another, and asks no other package


class Table(Mapping[str, Entry]):
    """Entries by name: `own` ones first, then what `register` added, then the entry points of `group`.

    Own entries cannot be replaced. An entry point is loaded when its name is looked up, not when names are listed.
    """

    def __init__(
        self, kind: str, group: str, own: Mapping[str, Entry], check: Callable[[str, object], str | None]
    ) -> None:
        """`kind`: what an entry is, for messages. `check(name, entry)` says why an entry cannot be used, or None."""
        self.kind, self.group, self.own = kind, group, dict(own)
        self._check = check
        self._registered: dict[str, Entry] = {}
        self._packages: dict[str, str] = {}

    def register(self, name: str, entry: Entry, *, package: str | None = None) -> None:
        """Add an entry; the same one, or its newer self after a reload, may be registered again.

        `package`: what to install to have it (None: the top-level module that defines it).

        Raises:
            InputError: a name that is taken, or an entry that cannot be used.
        """
        before = self._registered.get(name)
        if name in self.own or (before is not None and _identity(before) != _identity(entry)):
            owner = "linearize itself" if before is None else self._packages[name]
            raise InputError(f"{self.kind} {name!r} is registered by {owner}: register yours under another name")
        if reason := self._check(name, entry):
            raise InputError(f"{self.kind} {name!r} cannot be registered: {reason}")
        self._registered[name] = entry
        self._packages[name] = package or _identity(entry)[0].partition(".")[0]

    def unregister(self, name: str) -> None:
        """Remove an entry that `register` added, or an entry point that was loaded."""
        del self._registered[name], self._packages[name]

    def package(self, name: str) -> str | None:
        """The package to install to have an entry, None for an own one. Raises KeyError for an unknown name."""
        self[name]
        return None if name in self.own else self._packages[name]

    def __getitem__(self, name: str) -> Entry:
        """Raises KeyError for an unknown name, InputError for an entry point that cannot be loaded."""
        if name in self.own:
            return self.own[name]
        if name not in self._registered:
            self._load(name)
        return self._registered[name]

    def __contains__(self, name: object) -> bool:
        return name in self.own or name in self._registered or any(point.name == name for point in self._points())

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self.own, *self._registered, *sorted(point.name for point in self._points())]))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _points(self) -> Iterable[EntryPoint]:
        return entry_points(group=self.group) if __name__ == _OWN_NAME else ()

    def _load(self, name: str) -> None:
        points = {point.value: point for point in self._points() if point.name == name}
        if not points:
            raise KeyError(name)
        packages = [getattr(point.dist, "name", None) or point.module.partition(".")[0] for point in points.values()]
        if len(points) > 1:
            raise InputError(
                f"{self.kind} {name!r} is registered by {len(points)} packages ({', '.join(sorted(packages))}): "
                "uninstall all but one"
            )
        try:
            entry: Any = next(iter(points.values())).load()
        except Exception as error:  # whatever another package's import raises
            raise InputError(
                f"{self.kind} {name!r} is in the package {packages[0]}, which cannot be imported: {one_line(error)}"
            ) from error
        self.register(name, entry, package=packages[0])


def named_config(base: type[BaseModel]) -> Callable[[str, object], str | None]:
    """The check of tables whose entries are configs with a `name`: why one cannot be used, or None."""

    def check(name: str, entry: object) -> str | None:
        if not isinstance(entry, type) or not issubclass(entry, base):
            return f"it is {entry!r}, and a class derived from {base.__name__} is needed"
        if not name or config_name(entry) != name:
            return f'its field `name` has the default {config_name(entry)!r}: write `name: Literal["NAME"] = "NAME"`'
        return None

    return check


def config_name(config: type[BaseModel]) -> str:
    """The default of a config's field `name`; empty where it has none."""
    field = config.model_fields.get("name")
    return field.default if field is not None and isinstance(field.default, str) else ""


def choice(own: Iterable[type[BaseModel]], table: Callable[[], Table[Any]]) -> Any:
    """The type of a field that holds one of these configs, picked by its `name`: an `own` one, or one that a package
    added to the table, which is asked when a value has none of the own names."""
    known = tuple(own)
    names = {config_name(config) for config in known}

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        name = value.get("name") if isinstance(value, Mapping) else getattr(value, "name", None)
        if not isinstance(name, str) or name in names:
            return handler(value)
        others = table()
        if name in others.own or name not in others:
            expected = ", ".join(map(repr, [*names, *(other for other in others if other not in others.own)]))
            context = {"discriminator": "'name'", "tag": name, "expected_tags": expected}
            raise PydanticKnownError("union_tag_invalid", context)
        adapter: TypeAdapter[Any] = TypeAdapter(_union((*known, others[name])))
        return adapter.validate_python(value)

    union: Any = SerializeAsAny[_union(known)]  # type: ignore[misc]  # made from the table
    return Annotated[union, WrapValidator(validate)]


def _union(configs: tuple[type[BaseModel], ...]) -> Any:
    """The type of one of these configs, picked by its `name`."""
    return Annotated[Union.__getitem__(configs), Field(discriminator="name")]


def _identity(entry: object) -> tuple[str, str]:
    """Where an entry is defined: its module and name (of an object that has none, those of its class)."""
    named: Any = entry if hasattr(entry, "__qualname__") else type(entry)
    name = str(named.__qualname__)
    return str(named.__module__), name if named is entry else f"{name} {id(entry)}"
