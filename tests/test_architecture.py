"""The layout is the flow: imports go one way, few modules touch the world, none is long."""

import ast
import builtins
from collections import Counter
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from functools import cache
from pathlib import Path

import pytest

from tests.support.source import MODULES, PACKAGE, nodes_of, parse

pytestmark = pytest.mark.together("source")

_FIRST = {"errors", "arguments", "devnum", "address"}
_LOG = {"log", "waiting"}
_BELOW_VMS = {*_FIRST, *_LOG, "oci", "host", "drivers", "journal", "policy"}
MAY_IMPORT = {
    "errors": set[str](),
    "arguments": set[str](),
    "log": set[str](),
    "text": set[str](),
    "waiting": {"log"},
    "cached": set[str](),
    "devnum": set[str](),
    "address": {"devnum"},
    "oci": {*_FIRST, "cdi"},
    "cdi": {"errors", "arguments"},
    "host": {*_FIRST, *_LOG, "cached", "oci", "cdi"},
    "drivers": {*_FIRST, "oci", "host"},
    "hypervisor": {*_FIRST, *_LOG, "cached", "oci", "host", "drivers"},
    "journal": {*_FIRST, *_LOG, "oci", "host", "drivers"},
    "policy": {*_FIRST, "oci", "host", "drivers"},
    "manager": {*_FIRST, *_LOG, "cached", "oci", "cdi", "host", "drivers", "journal", "policy"},
    "leases": {*_BELOW_VMS, "hypervisor", "manager"},
    "vms": {*_BELOW_VMS, "hypervisor", "manager", "leases"},
    "aio": {*_BELOW_VMS, "hypervisor", "manager", "leases", "vms"},
    "kubernetes": {*_BELOW_VMS, "text", "cdi", "manager", "aio"},
    "cli": {*_BELOW_VMS, "text", "cdi", "manager", "leases", "vms", "kubernetes"},
}
"""Each part with the parts to its left.

`hypervisor` and `manager` do not know each other, nor do `journal` and `policy` know either: only
`leases` and `vms` know both. `cli` parses, makes one call of the library, and renders.
"""
VERB_LINES_MAX = 30
"""The body of a verb, without its help."""

CATCHES_OSERROR = {
    "aio/lease.py",  # a process that has ended
    "cdi/node.py",  # a node that is not there
    "cdi/own.py",
    "cdi/read.py",
    "cdi/registry.py",  # a directory that may not be read
    "cdi/write.py",  # its draft has gone
    "cli/answer.py",  # the answer cannot be written: its reader has gone, the disk is full
    "host/vhost_user/probe.py",
    "host/events.py",
    "host/file_id.py",
    "host/vhost_user/peer.py",  # a kernel without sock_diag
    "host/process.py",
    "host/use/enter.py",  # a namespace that may not be entered
    "host/program.py",
    "host/record/write.py",
    "host/record/read.py",
    "host/root.py",
    "hypervisor/listening.py",
    "hypervisor/virtiofsd.py",
    "hypervisor/qemu/nvdimm_lock.py",  # a file system without locks
    "hypervisor/qemu/start/accel.py",  # what cannot be kept is found out again
    "hypervisor/qemu/start/ended_logs.py",  # what a VM held is freed all the same
    "hypervisor/qemu/start/launch.py",
    "hypervisor/qmp/client.py",
    "hypervisor/qmp/wire.py",
    "leases/holder.py",  # the lock of another
    "leases/run.py",  # a command that cannot be started
    "journal/database.py",
    "kubernetes/kubelet.py",  # the sockets of kubelet
    "kubernetes/metrics.py",  # whoever asks for them
    "kubernetes/plugin.py",
    "kubernetes/service.py",
    "journal/lock.py",
    "host/use/qemu_lock.py",  # the lock of another
    "manager/kata/saved_state.py",
    "policy/toml.py",
    "host/permissions.py",
    "journal/salvage.py",
    "oci/source.py",
}

OSERRORS = {
    name
    for name, kind in vars(builtins).items()
    if isinstance(kind, type) and issubclass(kind, OSError)
}
"""OSError, its other names and its kinds: FileNotFoundError, BrokenPipeError, TimeoutError, ..."""

MADE_WITHOUT_MSGSPEC = {
    "Backend",
    "BlockDevice",
    "CharDevice",
    "DiskFile",
    "DiskPart",
    "CheckedFile",
    "Column",
    "EntropySource",
    "ImageFile",
    "Identity",
    "LoopBacking",
    "Mount",
    "OpenConnection",
    "PfnInfo",
    "Qcow2Header",
    "RequestArguments",
    "SharedDirectory",
    "VfioGroup",
    "VhostUserSocket",
    "_CacheEntry",
    "_DeviceFields",
    "_Pair",
}
"""Values that `resolve` reads: host/device.py says what it saves."""

SAYS_NOTHING = {"utils", "util", "common", "helpers", "helper", "types", "misc"}
LINES_MAX = 500


def part_of(module: str) -> str:
    """`host` for host/root.py and for vmplug.host.root, `errors` for errors.py."""
    return module.removeprefix("vmplug.").replace("/", ".").removesuffix(".py").split(".")[0]


@cache
def imported(module: str) -> frozenset[str]:
    """Every module of the package that a module imports, wherever in it, also only for types."""
    return frozenset(_imported(module))


def _imported(module: str) -> Iterator[str]:
    for node in nodes_of(module):
        match node:
            case ast.Import(names=names):
                yield from (name.name for name in names if name.name.startswith("vmplug"))
            case ast.ImportFrom(module="vmplug", names=names):
                yield from (f"vmplug.{name.name}" for name in names)
            case ast.ImportFrom(module=str(name)) if name.startswith("vmplug."):
                yield name
            case ast.ImportFrom(level=level) if level:
                pytest.fail(f"{module}:{node.lineno}: a relative import hides where it leads")
            case _:
                pass


def forgiven(module: str) -> set[str]:
    """Names of OSError and its kinds that a module catches or suppresses."""
    names = set[str]()
    for node in nodes_of(module):
        match node:
            case ast.ExceptHandler(type=ast.expr() as caught):
                names |= {name.id for name in ast.walk(caught) if isinstance(name, ast.Name)}
            case ast.Call(func=ast.Name(id="suppress") | ast.Attribute(attr="suppress")):
                names |= {name.id for name in node.args if isinstance(name, ast.Name)}
            case _:
                pass
    return names & OSERRORS


def test_the_parts_of_the_package_are_the_ones_with_rules() -> None:
    assert {part_of(module) for module in MODULES} - {"__init__"} == MAY_IMPORT.keys()


def test_imports_go_leftwards_only() -> None:
    wrong = {}
    for module in MODULES:
        part = part_of(module)
        if module != "__init__.py":
            parts = {part_of(name) for name in imported(module)}
            wrong[module] = parts - MAY_IMPORT[part] - {part}
    assert {module: parts for module, parts in wrong.items() if parts} == {}


def test_oserror_is_caught_only_at_the_doors_to_the_world() -> None:
    found = {module: forgiven(module) for module in MODULES}
    assert {module for module, names in found.items() if names} == CATCHES_OSERROR, found


def is_other_value(node: ast.AST) -> bool:
    """Whether it is a frozen dataclass, or a NamedTuple."""
    match node:
        case ast.ClassDef(bases=bases, decorator_list=decorators):
            is_tuple = any(ast.unparse(base).endswith("NamedTuple") for base in bases)
            texts = [ast.unparse(decorator) for decorator in decorators]
            return is_tuple or any("dataclass" in t and "frozen=True" in t for t in texts)
        case _:
            return False


def test_every_value_is_a_struct_except_those_that_resolve_reads() -> None:
    nodes = (node for module in MODULES for node in nodes_of(module) if is_other_value(node))
    assert {node.name for node in nodes if isinstance(node, ast.ClassDef)} == MADE_WITHOUT_MSGSPEC


def test_every_module_has_a_name_that_says_what_is_in_it() -> None:
    assert not {Path(module).stem for module in MODULES} & SAYS_NOTHING


def test_no_module_is_too_long_to_read() -> None:
    lines = {module: (PACKAGE / module).read_bytes().count(b"\n") for module in MODULES}
    assert {module: count for module, count in lines.items() if count > LINES_MAX} == {}


MODULES_MAX = 15
"""In a folder; one of verbs has as many as there are verbs."""

IN_HOST = [
    {"kind"},
    {"root", "finding", "program", "permissions", "events"},
    {"process"},
    {"use"},
    {"file_id", "cdi"},
    {"block"},
    {"pci", "vhost_user"},
    {"device"},
    {"check", "host_path", "paths"},
    {"resolve_named"},
    {"resolve"},
    {"inventory"},
    {"inventory_names"},
    {"thing"},
    {"record"},
]
"""The folders and modules of `host`: each may know those above its row, and no neighbour."""


ROWS = {name: row for row, names in enumerate(IN_HOST) for name in names}


def row_in_host(module: str) -> tuple[int, str] | None:
    """`block` and its row for host/block/loop.py and for vmplug.host.block.loop."""
    words = module.removeprefix("vmplug.").replace("/", ".").removesuffix(".py").split(".")
    if words[0] != "host" or words[1:2] in ([], ["__init__"]):
        return None
    return ROWS[words[1]], words[1]


def name_of(module: str) -> str:
    """`vmplug.host.block` for host/block/__init__.py."""
    return f"vmplug.{module.removesuffix('.py').replace('/', '.')}".removesuffix(".__init__")


@cache
def imported_modules(module: str) -> frozenset[str]:
    """As `imported`, but of `from vmplug.oci import limits` the module `limits`."""
    known = {name_of(each) for each in MODULES}
    found = imported(module) & known
    for node in nodes_of(module):
        if isinstance(node, ast.ImportFrom) and node.module in found:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & known
    return found - {name_of(module)}


def on_circles(graph: Mapping[str, AbstractSet[str]]) -> set[str]:
    """What is left when all that imports nothing left has been taken away, again and again."""
    left = dict(graph)
    while free := {name for name, names in left.items() if not names & left.keys()}:
        left = {name: names for name, names in left.items() if name not in free}
    return set(left)


def test_circles_are_found() -> None:
    assert on_circles({"a": {"b"}, "b": {"a"}, "c": set()}) == {"a", "b"}
    assert on_circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == set()


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Deferred imports and those only for types count too: they hide a circle, and break none."""
    modules = [module for module in MODULES if module != "__init__.py"]
    assert on_circles({name_of(each): imported_modules(each) for each in modules}) == set()


def test_within_the_host_imports_go_upwards_only() -> None:
    wrong = {}
    for module in MODULES:
        if own := row_in_host(module):
            rows = {row for name in imported_modules(module) if (row := row_in_host(name))}
            wrong[module] = {row for row in rows if row[0] >= own[0]} - {own}
    assert len(wrong) > 20
    assert {module: rows for module, rows in wrong.items() if rows} == {}


def test_no_folder_has_more_modules_than_one_can_overlook() -> None:
    unread = ("__init__.py", "_pb2.py", "_grpc.py")  # tools/make-stubs writes the last two
    paths = [Path(module) for module in MODULES if not module.endswith(unread)]
    folders = Counter(path.parent.as_posix() for path in paths)
    del folders["cli/verbs"]
    assert {folder: count for folder, count in folders.items() if count > MODULES_MAX} == {}


COMPLEXITY_MAX = 12
"""Of a function: one way through it, and one more for each branch, turn, handler and case."""
NESTING_MAX = 4
"""Blocks within blocks of a function."""

BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.TryStar, ast.Match)
BRANCHES = (ast.If, ast.For, ast.While, ast.ExceptHandler, ast.match_case)
STATEMENTS = ("body", "orelse", "finalbody", "handlers", "cases")
"""The fields of a statement that hold others."""


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function of the package, by its module and name."""
    for module in MODULES:
        for node in nodes_of(module):
            if isinstance(node, ast.FunctionDef):
                yield f"{module}:{node.name}", node


def complexity(function: ast.AST) -> int:
    return 1 + branches(function)


def branches(node: ast.AST) -> int:
    """Those in a statement; there is none in an expression."""
    inner = [each for field in STATEMENTS for each in getattr(node, field, [])]
    return sum(isinstance(each, BRANCHES) + branches(each) for each in inner)


def nesting(node: ast.AST) -> int:
    """The deepest block in a statement; an `elif` is as deep as its `if`."""
    deepest = 0
    for field in STATEMENTS:
        inner: list[ast.AST] = getattr(node, field, [])
        is_elif = field == "orelse" and isinstance(node, ast.If) and len(inner) == 1
        for each in inner:
            if isinstance(each, ast.FunctionDef | ast.ClassDef):
                continue
            is_block = isinstance(each, BLOCKS) and not (is_elif and isinstance(each, ast.If))
            deepest = max(deepest, nesting(each) + is_block)
    return deepest


def test_complexity_and_nesting_are_counted() -> None:
    source = """
def f():
    for a in b:
        try:
            pass
        except E:
            if a:
                pass
            elif b:
                with c:
                    pass
        def g():
            while a:
                while b:
                    pass
"""
    (function,) = ast.parse(source).body
    assert (complexity(function), nesting(function)) == (7, 4)


def test_no_function_is_too_tangled_to_follow() -> None:
    found = {name: complexity(node) for name, node in functions()}
    assert {name: count for name, count in found.items() if count > COMPLEXITY_MAX} == {}


def test_no_function_has_too_many_blocks_within_blocks() -> None:
    found = {name: nesting(node) for name, node in functions()}
    assert {name: count for name, count in found.items() if count > NESTING_MAX} == {}


def verbs() -> Iterator[tuple[str, ast.FunctionDef]]:
    """The functions that are commands, by module."""
    for module in MODULES:
        if module.startswith("cli/verbs/"):
            for node in parse(module).body:
                if isinstance(node, ast.FunctionDef) and any(
                    "command" in ast.unparse(decorator) for decorator in node.decorator_list
                ):
                    yield module, node


def test_a_verb_parses_makes_a_call_and_renders() -> None:
    lines = {}
    for module, verb in verbs():
        body = verb.body[1:] if ast.get_docstring(verb) else verb.body
        lines[f"{module}:{verb.name}"] = (verb.end_lineno or 0) - body[0].lineno + 1
    assert len(lines) > 20
    assert {verb: count for verb, count in lines.items() if count > VERB_LINES_MAX} == {}
