"""Custom ascents and descents: to a description in plain data, and back."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import sys
from collections.abc import Mapping
from typing import Any

from ..suggestions import did_you_mean
from .base import Ascent, Descent


def describe_part(part: Ascent | Descent) -> dict[str, Any]:
    """The import path of a part's class, and its fields."""
    kind = type(part)
    return {"class": f"{kind.__module__}:{kind.__qualname__}", **dataclasses.asdict(part)}


def refuse_undeclared(part: Ascent | Descent) -> None:
    """Raise an error for hyperparameters that are no fields: checkpoints would lose them.

    Raises:
        ValueError: A class without `@dataclass` declares a field, or its own `__init__` sets an attribute.
    """
    kind = type(part)
    fields = {field.name for field in dataclasses.fields(part)}
    undecorated = list(itertools.takewhile(lambda k: "__dataclass_fields__" not in vars(k), kind.__mro__))
    declared = [
        name
        for k in undecorated
        for name, annotation in inspect.get_annotations(k).items()
        if not str(annotation).startswith(("ClassVar", "typing.ClassVar"))
    ]
    set_by_init = vars(part).keys() if any("__init__" in vars(k) for k in undecorated) else ()
    if lost := [name for name in dict.fromkeys([*declared, *set_by_init]) if name not in fields]:
        raise ValueError(
            f"{kind.__name__}: {', '.join(lost)} would be missing in checkpoints, which keep the fields of a dataclass. Put "
            f"@dataclass(frozen=True) above the class and declare {'it' if len(lost) == 1 else 'them'} there, as "
            f"`{lost[0]}: float = 1.0`, in place of an __init__."
        )


def part_from_description(values: Any, kind: type) -> Ascent | Descent:
    """The inverse of `describe_part`. The module must have been imported: reading a file never imports code.

    Raises:
        ValueError: The class is missing, is not a subclass of `kind`, or has other fields.
    """
    if isinstance(values, kind):
        return values
    if not isinstance(values, Mapping) or not isinstance(values.get("class"), str):
        raise ValueError(f'{values!r} must be a mapping with the path of a class, such as {{"class": "module:Class"}}.')
    fields = dict(values)
    path = fields.pop("class")
    module, _, name = path.partition(":")
    if module not in sys.modules:
        raise ValueError(
            f"{path}: the module {module} is not imported, and reading a file never imports code. Run `import {module}` first, or "
            f"name the class on the command line (--sam_{kind.__name__.lower()} {path})."
        )
    return make_part(_class_in(sys.modules[module], module, name, kind), fields)


def load_part(path: str, kind: type) -> type:
    """Import the class at `module:Class`.

    Raises:
        ValueError: The module or class does not exist, or the class is not a subclass of `kind`.
    """
    module, _, name = path.partition(":")
    if not name:
        raise ValueError(f"{path!r} must be the path of a class, as in my_package.my_module:MyClass.")
    if "" not in sys.path:
        sys.path.insert(0, "")  # for modules in the working directory, as under `python -m`
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{path}: the module {module} cannot be imported ({error}). Run the command in the folder that contains it, or add that "
            "folder to PYTHONPATH."
        ) from error
    return _class_in(found, module, name, kind)


def load_parts(ascent: str | None, descent: str | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """`SAMConfig`'s `ascent`, `descent` and `options`, from the paths of classes and one mapping of hyperparameters.

    Each option goes to the class that has a field of its name; the rest go to the ascent and descent of the method.

    Raises:
        ValueError: A class cannot be imported, or an option resembles a field of a class but is not one.
    """
    left, made, known = dict(options or {}), {}, []
    for name, path, kind in (("ascent", ascent, Ascent), ("descent", descent, Descent)):
        if path is not None:
            found = load_part(path, kind)
            own = [field.name for field in dataclasses.fields(found)]
            known += own
            made[name] = make_part(found, {key: left.pop(key) for key in list(left) if key in own})
    if made and left and not known:
        raise ValueError(f"options={left!r}: {' and '.join(type(m).__name__ for m in made.values())} has no fields.")
    for key in left if made else ():
        if hint := did_you_mean(key, known):
            raise ValueError(f"options: {key!r} is not a field.{hint} Allowed: {', '.join(known)}.")
    return {"ascent": None, "descent": None, **made, "options": left or None}


def make_part(kind: type, values: Mapping[str, Any]) -> Ascent | Descent:
    """Create an instance.

    Raises:
        ValueError: The class does not have a field, or a value is out of range; the message names the field.
    """
    known = [field.name for field in dataclasses.fields(kind) if field.init]
    for name in values:
        if name not in known:
            raise ValueError(
                f"{kind.__name__} has no field {name!r}.{did_you_mean(name, known)} Allowed: {', '.join(known) or 'none'}."
            )
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{kind.__name__} cannot be created: {error}.") from error


def _class_in(module: Any, module_name: str, name: str, kind: type) -> type:
    found = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type) or not issubclass(found, kind):
        classes = [k for k, v in vars(module).items() if isinstance(v, type) and issubclass(v, kind) and v is not kind]
        raise ValueError(
            f"{module_name}:{name} is not a subclass of hf_sam.{kind.__name__}.{did_you_mean(name, classes)} The module has: "
            f"{', '.join(classes) or 'none'}."
        )
    return found
