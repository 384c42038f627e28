"""What many dictionaries and containers hold, read and compared without a loop in Python.

A step looks at everything that modules keep several times, and almost always finds that nothing has changed. So what there
is to read is listed once, and each look is a few calls that loop in C.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from operator import call, is_, itemgetter
from typing import Any

Values = list[tuple[Any, ...]]

_joined = chain.from_iterable


def are_identical(left: Iterable[Any], right: Iterable[Any]) -> bool:
    """Whether two iterables of the same length hold the very same objects in the same order."""
    return all(map(is_, left, right))


class Namespaces:
    """The values of the names that some dictionaries have now.

    Args:
        dictionaries (`Iterable[dict]`): The dictionaries.
        left_out (`frozenset[str]`, *optional*): Names whose values are not read.
    """

    def __init__(self, dictionaries: Iterable[dict[str, Any]], left_out: frozenset[str] = frozenset()):
        self.dictionaries, self._left_out = list(dictionaries), left_out
        self._lengths = list(map(len, self.dictionaries))
        self._names = [tuple(name for name in d if name not in left_out) for d in self.dictionaries]
        # The last name is read twice, because an `itemgetter` of a single name returns no tuple.
        self._getters = [itemgetter(*names, names[-1]) if names else _nothing for names in self._names]

    def read(self) -> Values | None:
        """All values; None if one of the dictionaries now has other names."""
        if list(map(len, self.dictionaries)) != self._lengths:
            return None
        try:
            return list(map(call, self._getters, self.dictionaries))
        except KeyError:
            return None

    def have(self, values: Values) -> bool:
        """Whether the dictionaries have the names that they had at first, with these values."""
        now = self.read()
        return now is not None and are_identical(_joined(now), _joined(values))

    def changed(self, values: Values) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """The dictionaries that have other names or values, each with what it had."""
        for dictionary, names, then in zip(self.dictionaries, self._names, values, strict=True):
            before, now = dict(zip(names, then, strict=False)), self.own(dictionary)
            if before.keys() != now.keys() or not are_identical(map(now.get, before), before.values()):
                yield dictionary, before

    def without(self, known: set[int]) -> Namespaces:
        """The dictionaries whose ids are not known yet, read anew."""
        return Namespaces((d for d in self.dictionaries if id(d) not in known), self._left_out)

    def own(self, dictionary: dict[str, Any]) -> dict[str, Any]:
        """What a dictionary has now, without the names that are left out."""
        return {name: value for name, value in dictionary.items() if name not in self._left_out}


def _nothing(dictionary: dict[str, Any]) -> tuple[()]:
    return ()
