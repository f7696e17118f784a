"""Run with NVIDIA's bindings on the path: prints the API as JSON, read from the classes and their docstrings.

{"version", "classes": {name: {"bases", "methods": {name: [[[[argument, type, optional], ...], returned], ...]},
"properties": {name: [type, writable]}, "members": [of an enum], "nested": {enum: [members]},
"constants": {name: enum}}}}
"""

import json
import re

import tensorrt_bindings as trt

SIGNATURE = re.compile(r"^(?:\d+\. )?(\w+)\((.*)\) -> (.+)$")


def split(arguments):
    """At commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for at, letter in enumerate(arguments):
        depth += (letter in "[<({") - (letter in "]>)}")
        if letter == "," and depth == 0:
            parts.append(arguments[start:at])
            start = at + 1
    return [part.strip() for part in [*parts, arguments[start:]] if part.strip()]


def signatures(doc):
    found = []
    for line in (doc or "").splitlines():
        match = SIGNATURE.match(line.strip())
        if match and "*args" not in match[2]:
            arguments = []
            for part in split(match[2]):
                name, _, kind = part.partition(":")
                kind, _, default = kind.partition("=")
                arguments.append([name.strip(), kind.strip().split(".")[-1], bool(default)])
            found.append([arguments[1:], match[3].split(".")[-1].replace("nvonnxparser::I", "")])
    return found


def describe(kind):
    own = {"bases": [base.__name__ for base in kind.__mro__[1:] if base.__module__.startswith("tensorrt")]}
    own |= {"methods": {}, "properties": {}, "members": [], "nested": {}, "constants": {}}
    for name in dir(kind):
        if name.startswith("_") and name != "__init__":
            continue
        value = getattr(kind, name)
        if isinstance(value, kind):
            own["members"].append(name)
        elif isinstance(value, property):
            doc = (value.fget.__doc__ or "").strip()
            own["properties"][name] = [doc.split("->")[-1].strip().split(".")[-1], value.fset is not None]
        elif isinstance(value, type):
            own["nested"][name] = [member for member in dir(value) if isinstance(getattr(value, member), value)]
        elif type(value).__module__.startswith("tensorrt"):
            own["constants"][name] = type(value).__name__
        elif callable(value):
            own["methods"][name] = signatures(value.__doc__)
    return own


classes = {name: value for name, value in vars(trt).items() if isinstance(value, type)}
print(json.dumps({"version": trt.__version__, "classes": {name: describe(kind) for name, kind in classes.items()}}))
