"""The modules of vmplug as they are written; each is parsed once."""

import ast
from functools import cache
from pathlib import Path

import vmplug

PACKAGE = Path(vmplug.__file__).parent
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@cache
def parse(module: str) -> ast.Module:
    """The module with that path in the package."""
    return ast.parse((PACKAGE / module).read_bytes(), module)


@cache
def nodes_of(module: str) -> tuple[ast.AST, ...]:
    """Everything that is in it."""
    return tuple(ast.walk(parse(module)))
