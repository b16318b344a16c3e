import logging
from collections.abc import Callable, Iterator
from logging.handlers import BufferingHandler
from pathlib import Path

import pytest

from tests.unit.kubernetes.world import Node


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    yield node
    node.close()


@pytest.fixture
def log_text(logged: BufferingHandler) -> Iterator[Callable[[], str]]:
    """What vmplug has logged so far, from info on."""
    logger = logging.getLogger("vmplug")
    level = logger.level
    logger.setLevel(logging.INFO)
    yield lambda: "\n".join(record.getMessage() for record in logged.buffer)
    logger.setLevel(level)
