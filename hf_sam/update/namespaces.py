"""Fast comparison of the attributes of many modules.

Every step checks the attributes of all modules several times and almost always finds them unchanged. The names to read
are therefore listed once, and each check is a few calls whose loops run in C.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from operator import call, is_, itemgetter
from typing import Any

Values = list[tuple[Any, ...]]

_flatten = chain.from_iterable


def are_identical(left: Iterable[Any], right: Iterable[Any]) -> bool:
    """Whether two iterables of the same length hold the same objects (`is`, not `==`) in the same order."""
    return all(map(is_, left, right))


class Namespaces:
    """The current values of a fixed set of dictionaries, such as the `__dict__` of each module.

    Args:
        dictionaries (`Iterable[dict]`): The dictionaries.
        excluded (`frozenset[str]`, *optional*): Keys to ignore.
    """

    def __init__(self, dictionaries: Iterable[dict[str, Any]], excluded: frozenset[str] = frozenset()):
        self.dictionaries, self._excluded = list(dictionaries), excluded
        self._lengths = list(map(len, self.dictionaries))
        self._names = [tuple(name for name in d if name not in excluded) for d in self.dictionaries]
        # The last name is read twice because `itemgetter` with a single name does not return a tuple.
        self._getters = [itemgetter(*names, names[-1]) if names else _no_values for names in self._names]

    def read(self) -> Values | None:
        """Read all values; None if the keys of a dictionary have changed since construction."""
        if list(map(len, self.dictionaries)) != self._lengths:
            return None
        try:
            return list(map(call, self._getters, self.dictionaries))
        except KeyError:
            return None

    def match(self, values: Values) -> bool:
        """Whether the keys are those at construction and the values are these objects."""
        now = self.read()
        return now is not None and are_identical(_flatten(now), _flatten(values))

    def changed(self, values: Values) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Yield each dictionary whose keys or values have changed, with its previous content."""
        for dictionary, names, then in zip(self.dictionaries, self._names, values, strict=True):
            before, now = dict(zip(names, then, strict=False)), self.included(dictionary)
            if before.keys() != now.keys() or not are_identical(map(now.get, before), before.values()):
                yield dictionary, before

    def excluding(self, known: set[int]) -> Namespaces:
        """The dictionaries whose ids are not in `known`, with their current keys."""
        return Namespaces((d for d in self.dictionaries if id(d) not in known), self._excluded)

    def included(self, dictionary: dict[str, Any]) -> dict[str, Any]:
        """The current content of a dictionary, without excluded keys."""
        return {name: value for name, value in dictionary.items() if name not in self._excluded}


def _no_values(dictionary: dict[str, Any]) -> tuple[()]:
    return ()
