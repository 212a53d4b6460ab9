"""What `isinstance` is told of objects that stand in for transformers' own, without importing transformers."""

from __future__ import annotations

import sys

__all__ = ["seen_as"]

# (a class of ours, a class of transformers) -> the class that is both.
_BOTH: dict[tuple[type, type], type] = {}

# A class of ours -> what it was last seen as, while this was transformers' module.
_SEEN: dict[type, tuple[object, type]] = {}


def seen_as(own: type, base: type, module: str) -> type:
    """The class to show as `__class__` of an `own`.

    That is a class which is also the one of the same name in transformers' `module`, if that is loaded; the names of
    the classes between `own` and `base` will do too.

    Args:
        own: the object's type.
        base: the outermost class of ours whose name counts.
        module: e.g. `"transformers.cache_utils"`.
    """
    theirs = sys.modules.get(module)
    last = _SEEN.get(own)
    if last is not None and last[0] is theirs:
        return last[1]
    names = (one.__name__ for one in own.__mro__ if issubclass(one, base))
    twin = next((found for name in names if isinstance(found := getattr(theirs, name, None), type)), None)
    if twin is None:
        return own
    if (own, twin) not in _BOTH:
        _BOTH[own, twin] = type(own.__name__, (own, twin), {"__module__": own.__module__})
    _SEEN[own] = theirs, _BOTH[own, twin]
    return _BOTH[own, twin]
