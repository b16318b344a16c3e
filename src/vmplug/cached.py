"""A property that is read once for each object, and waits for no other object's."""

from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar, overload

T = TypeVar("T")


class cached_property(Generic[T]):  # noqa: N801  as that of functools
    """What `functools.cached_property` is from Python 3.12 on; two threads may both read it.

    In Python 3.11 that has one lock for all objects of a class. A thread that waits for one VM or
    one storage would block those of all others, and a child of fork(2) would wait forever.
    Source: docs.python.org, "What's New In Python 3.12", functools.
    """

    def __init__(self, read: Callable[[Any], T]) -> None:
        self._read = read
        self._name = read.__name__
        self.__doc__ = read.__doc__

    @overload
    def __get__(self, instance: None, owner: type | None = None) -> Self: ...

    @overload
    def __get__(self, instance: object, owner: type | None = None) -> T: ...

    def __get__(self, instance: object | None, owner: type | None = None) -> Self | T:
        """The value; from then on it is in the object's dictionary, where Python finds it."""
        if instance is None:
            return self
        known: dict[str, T] = instance.__dict__
        return known.setdefault(self._name, self._read(instance))
