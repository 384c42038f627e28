"""What many dictionaries and containers hold, read and compared excluding a loop in Python.

A step looks at everything that modules keep several times, and almost always finds that nothing has changed. So what there
is to read is listed once, and each look is a few calls that loop in C.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from operator import call, is_, itemgetter
from typing import Any

Values = list[tuple[Any, ...]]

_flatten = chain.from_iterable


def are_identical(left: Iterable[Any], right: Iterable[Any]) -> bool:
    """Whether two iterables of the same length hold the very same objects in the same order."""
    return all(map(is_, left, right))


class Namespaces:
    """The values of the names that some dictionaries have now.

    Args:
        dictionaries (`Iterable[dict]`): The dictionaries.
        excluded (`frozenset[str]`, *optional*): Names whose values are not read.
    """

    def __init__(self, dictionaries: Iterable[dict[str, Any]], excluded: frozenset[str] = frozenset()):
        self.dictionaries, self._excluded = list(dictionaries), excluded
        self._lengths = list(map(len, self.dictionaries))
        self._names = [tuple(name for name in d if name not in excluded) for d in self.dictionaries]
        # The last name is read twice, because an `itemgetter` of a single name returns no tuple.
        self._getters = [itemgetter(*names, names[-1]) if names else _no_values for names in self._names]

    def read(self) -> Values | None:
        """All values; None if one of the dictionaries now has other names."""
        if list(map(len, self.dictionaries)) != self._lengths:
            return None
        try:
            return list(map(call, self._getters, self.dictionaries))
        except KeyError:
            return None

    def match(self, values: Values) -> bool:
        """Whether the dictionaries have the names that they had at first, with these values."""
        now = self.read()
        return now is not None and are_identical(_flatten(now), _flatten(values))

    def changed(self, values: Values) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """The dictionaries that have other names or values, each with what it had."""
        for dictionary, names, then in zip(self.dictionaries, self._names, values, strict=True):
            before, now = dict(zip(names, then, strict=False)), self.included(dictionary)
            if before.keys() != now.keys() or not are_identical(map(now.get, before), before.values()):
                yield dictionary, before

    def excluding(self, known: set[int]) -> Namespaces:
        """The dictionaries whose ids are not known yet, read anew."""
        return Namespaces((d for d in self.dictionaries if id(d) not in known), self._excluded)

    def included(self, dictionary: dict[str, Any]) -> dict[str, Any]:
        """What a dictionary has now, excluding the names that are left out."""
        return {name: value for name, value in dictionary.items() if name not in self._excluded}


def _no_values(dictionary: dict[str, Any]) -> tuple[()]:
    return ()
