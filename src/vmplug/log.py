"""Log, and import logging only for somebody who hears it.

It costs 4 ms, an eighth of `python -c 'import click'`. A program that hears the log has imported
it, and a warning is for everybody.
"""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from logging import Logger

_DEBUG = 10
"""logging.DEBUG"""
_CALLER = 2
"""For a handler that names the line: it is the caller of these methods that logs."""


class Log:
    """The logger with the name of a module."""

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def _heard(self) -> "Logger | None":
        """None while nobody can hear it: what sets a handler or a level has imported logging."""
        return self._logger() if "logging" in sys.modules else None

    def _logger(self) -> "Logger":
        import logging  # noqa: PLC0415  4 ms; waits for a thread that is importing it

        return logging.getLogger(self._name)

    @property
    def is_debug(self) -> bool:
        """Whether somebody hears `debug`."""
        heard = self._heard
        return heard is not None and heard.isEnabledFor(_DEBUG)

    def debug(
        self, text: str, *arguments: object, extra: Mapping[str, object] | None = None
    ) -> None:
        """What is done, step by step."""
        if heard := self._heard:
            heard.debug(text, *arguments, extra=extra, stacklevel=_CALLER)

    def info(
        self, text: str, *arguments: object, extra: Mapping[str, object] | None = None
    ) -> None:
        """What has changed."""
        if heard := self._heard:
            heard.info(text, *arguments, extra=extra, stacklevel=_CALLER)

    def warning(
        self, text: str, *arguments: object, extra: Mapping[str, object] | None = None
    ) -> None:
        """What vmplug goes on in spite of; without any handler it goes to stderr."""
        self._logger().warning(text, *arguments, extra=extra, stacklevel=_CALLER)
