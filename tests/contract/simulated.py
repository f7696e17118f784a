"""A `tensorrt` that has exactly the API it was described with: whatever else is asked of it raises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

NUMBERS = {"int", "SupportsInt", "SupportsIndex", "float", "SupportsFloat"}
Answers = Mapping[str, Any]  # "Class.method" or "Class.property" -> what it gives, or a function of its arguments


def simulate(description: Mapping[str, Any], answers: Answers) -> ModuleType:
    """The module. Calls are kept in its `calls`: ("Class.method", arguments)."""
    module = ModuleType("tensorrt")
    calls: list[tuple[str, tuple[Any, ...]]] = []
    kinds: dict[str, type] = {}
    made = {"calls": calls, "__version__": description["version"]}
    for name, api in description["classes"].items():
        kinds[name] = type(name, (_Simulated,), {"api": api, "answers": answers, "kinds": kinds, "calls": calls})
    for name, api in description["classes"].items():
        known = [kinds[base] for base in api["bases"] if base in kinds]
        if known:
            body = {"api": api, "answers": answers, "kinds": kinds, "calls": calls}
            kinds[name] = type(name, (known[0],), body)
        for value, member in enumerate(api["members"]):
            setattr(kinds[name], member, _member(kinds[name], member, value))
    module.__dict__.update(made, **kinds)
    for name, api in description["classes"].items():
        for enum, members in api["nested"].items():
            if enum not in kinds:
                nested = {"api": {"methods": {}, "properties": {}}, "answers": answers, "kinds": kinds, "calls": calls}
                kinds[enum] = type(enum, (_Simulated,), nested)
                for value, member in enumerate(members):
                    setattr(kinds[enum], member, _member(kinds[enum], member, value))
            setattr(kinds[name], enum, kinds[enum])
        for constant, enum in api["constants"].items():
            setattr(kinds[name], constant, getattr(kinds[enum], constant))
    module.__getattr__ = _absent("the module")  # type: ignore[method-assign]
    return module


def _absent(where: str) -> Callable[[str], Any]:
    def missing(name: str) -> Any:
        raise AssertionError(f"TensorRT has no {name!r} in {where}")

    return missing


def _member(kind: type, name: str, value: int) -> Any:
    member = object.__new__(kind)
    object.__setattr__(member, "name", name)
    object.__setattr__(member, "value", value)
    return member


class _Simulated:
    api: Mapping[str, Any]
    answers: Answers
    kinds: Mapping[str, type]
    calls: list[tuple[str, tuple[Any, ...]]]

    def __init__(self, *arguments: Any) -> None:
        name = type(self).__name__
        if name in self.kinds and self.kinds[name] is type(self):
            check(f"{name}.__init__", self.api["methods"].get("__init__", []), arguments, {}, self.kinds)

    def __int__(self) -> int:
        return int(self.__dict__["value"])

    def __getattr__(self, name: str) -> Any:
        kind = next(base.__name__ for base in type(self).__mro__ if base.__name__ in self.kinds)
        where = f"{kind}.{name}"
        if name in self.api["methods"]:
            return lambda *arguments, **named: self._call(where, name, arguments, named)
        if name in self.api["properties"]:
            if where in self.answers:
                return self.answers[where]
            return self._returned(self.api["properties"][name][0])
        raise AssertionError(f"TensorRT has no {where}")

    def __setattr__(self, name: str, value: Any) -> None:
        kind = next(base for base in type(self).__mro__ if base.__name__ in self.kinds)
        if kind is not type(self):
            object.__setattr__(self, name, value)  # of a class of ours
            return
        if name not in self.api["properties"] or not self.api["properties"][name][1]:
            raise AssertionError(f"TensorRT does not let {kind.__name__}.{name} be set")
        self.calls.append((f"{kind.__name__}.{name}", (value,)))

    def _call(self, where: str, name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        returned = check(where, self.api["methods"][name], arguments, named, self.kinds)
        self.calls.append((where, arguments))
        if where in self.answers:
            answer = self.answers[where]
            return answer(*arguments) if callable(answer) else answer
        return self._returned(returned)

    def _returned(self, kind: str) -> Any:
        if kind in self.kinds:
            return object.__new__(self.kinds[kind])
        return {"bool": True, "int": 0, "str": "", "None": None}.get(kind)


def check(
    where: str,
    overloads: list[Any],
    arguments: tuple[Any, ...],
    named: Mapping[str, Any],
    kinds: Mapping[str, type],
) -> str:
    """The returned type of the first overload that takes these arguments; raises `AssertionError` if none does."""
    for parameters, returned in overloads:
        names = [name for name, _, _ in parameters]
        if len(arguments) > len(parameters) or not set(named) <= set(names[len(arguments) :]):
            continue
        given = {**dict(zip(names, arguments, strict=False)), **named}
        if all(optional or name in given for name, _, optional in parameters) and all(
            fits(given[name], kind, kinds) for name, kind, _ in parameters if name in given
        ):
            return str(returned)
    raise AssertionError(f"{where} does not take {arguments} {dict(named)}; it takes {overloads}")


def fits(value: Any, kind: str, kinds: Mapping[str, type]) -> bool:
    if kind in kinds and kind != "Dims":
        return isinstance(value, kinds[kind])
    if kind in NUMBERS:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind in ("tuple", "Dims"):
        return isinstance(value, tuple)
    plain = {"str": str, "bool": bool, "buffer": bytes, "Buffer": bytes, "bytes": bytes}
    return isinstance(value, plain[kind]) if kind in plain else True
