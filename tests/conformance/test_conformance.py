import os
from collections.abc import Iterator
from typing import NamedTuple
from pathlib import Path

import pytest

from tests.conformance import addresses, paths
from tests.conformance.vector import Adapter, Case, Deviation, Facts, Vector, full, load_vectors, plain

PARTS = (paths, addresses)
