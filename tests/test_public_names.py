"""`import vmplug`: what it offers, and what that costs."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import vmplug
from tests.support.disks import disk_image
from tests.support.tree import HostTree
from vmplug.host.root import THIS_HOST
from vmplug.host.use import silent

VMPLUG = Path(sys.executable).with_name("vmplug")
PUBLIC: tuple[str, ...] = getattr(vmplug, "__all__")  # noqa: B009  made when asked for
HEAVY = {"asyncio", "click", "msgspec", "sqlite3"}
"""What `import vmplug` leaves alone; each of them costs more than the rest of it together."""


def names_in_stub() -> dict[str, str]:
    """Public name -> module, as `__init__.pyi` tells type checkers."""
    stub = ast.parse(Path(vmplug.__file__).with_suffix(".pyi").read_text())
    return {
        alias.asname or alias.name: node.module
        for node in stub.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


def modules_after(code: str) -> set[str]:
    """The modules that a new interpreter has loaded after running `code`."""
    report = "import sys; print(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    return set(done.stderr.split())


def modules_of_process(*arguments: str) -> set[str]:
    """The modules that `vmplug` imports in a process of its own, as the interpreter logs them."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(VMPLUG), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


def test_every_public_name_can_be_imported() -> None:
    assert [name for name in PUBLIC if getattr(vmplug, name, None) is None] == []
    assert set(PUBLIC) <= set(dir(vmplug))


def test_an_unknown_name_is_an_attribute_error_as_of_any_module() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = vmplug.Nonsense  # type: ignore[attr-defined]


def test_every_name_of_the_stub_is_found_at_run_time() -> None:
    assert {*names_in_stub(), "__version__"} == set(PUBLIC)


def test_every_error_is_public() -> None:
    assert set(import_module("vmplug.errors").__all__) <= set(PUBLIC)


def test_importing_vmplug_alone_imports_nothing_heavy() -> None:
    loaded = modules_after("import vmplug")
    assert "vmplug" in loaded
    assert not loaded & HEAVY
    assert {name for name in loaded if name.startswith("vmplug.")} == set()


def test_a_name_brings_only_what_it_needs() -> None:
    loaded = modules_after("from vmplug import DeviceInfo, HostRoot, get_host_path")
    assert "vmplug.host.host_path" in loaded
    assert not loaded & {*HEAVY, "vmplug.host.resolve"}


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_resolving_one_device_imports_nothing_heavy(more: tuple[str, ...]) -> None:
    loaded = modules_of_process("resolve", "--device", "c:1:3:/dev/null", *more)
    assert {"click", "vmplug.host.resolve"} <= loaded
    assert not loaded & {"asyncio", "msgspec", "rich", "sqlite3", "subprocess"}


SLOW = {
    *("asyncio", "concurrent.futures", "json", "logging", "pathlib", "socket"),
    *("subprocess", "tempfile"),
}
"""Modules of Python that these verbs do without, each some percent of what they cost."""


@pytest.mark.parametrize("words", [("list",), ("check", "--device", "c:1:3:/dev/null")])
def test_a_verb_imports_nothing_that_only_few_requests_need(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    loaded = modules_of_process(*words, "--state-dir", str(tmp_path))
    assert {"msgspec", "sqlite3"} <= loaded
    assert not loaded & SLOW


def test_a_check_imports_what_talks_only_for_what_can_answer(tmp_path: Path) -> None:
    """Storage that may not answer is asked first, by a process of its own."""
    host, state = HostTree(tmp_path / "host").hole("/a.img", 1 << 20), tmp_path / "state"
    state.mkdir(mode=0o700)
    words = ("--device", "file:/a.img", "--root", str(host.path), "--state-dir", str(state))
    loaded = modules_of_process("check", *words)
    assert "vmplug.manager.examine" in loaded
    asks = silent._choose_at_risk({"": str(state)}, THIS_HOST)
    assert not loaded & ({"socket"} if asks else {"socket", "subprocess"})


def test_a_check_imports_a_policy_only_where_there_is_one(tmp_path: Path) -> None:
    words = ("--device", "c:1:3:/dev/null", "--state-dir", str(tmp_path))
    loaded = modules_of_process("check", *words)
    assert "vmplug.manager.examine" in loaded
    assert not loaded & {"vmplug.policy.gate", "vmplug.policy.rules", "fnmatch"}


@pytest.mark.parametrize("words", [("list",), ("host",)])
def test_a_verb_that_lists_imports_nothing_that_plugs(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    loaded = modules_of_process(*words, "--state-dir", str(tmp_path))
    assert "click" in loaded
    assert not loaded & {
        *SLOW,
        "dataclasses",
        "vmplug.cli.render.kata_agent",
        "vmplug.cli.request",
        "vmplug.drivers.block",
        "vmplug.hypervisor.qemu.running",
        "vmplug.hypervisor.virtiofsd",
        "vmplug.host.finding",
    }


def test_a_list_imports_for_a_kind_of_device_only_what_that_needs(tmp_path: Path) -> None:
    loaded = modules_of_process("list", "--state-dir", str(tmp_path))
    assert "vmplug.journal.journal" in loaded
    assert not loaded & {
        "vmplug.host.block.qcow2",
        "vmplug.host.pci.bind",
        "vmplug.host.pci.mdev",
        "vmplug.host.vhost_user.sockets",
    }


@pytest.mark.parametrize(
    ("words", "most"),
    [
        (("resolve", "--device", "c:1:3:/dev/null"), 44),
        (("list", "--state-dir", "{state}"), 77),
        (("check", "--device", "c:1:3:/dev/null", "--state-dir", "{state}"), 114),
        (("host", "--root", "{host}"), 56),
    ],
)
def test_a_verb_imports_few_modules(words: tuple[str, ...], most: int, tmp_path: Path) -> None:
    """Each costs 0.2 ms to find and read. Who adds one says here that the verb needs it."""
    (state := tmp_path / "state").mkdir(mode=0o700)
    host = HostTree(tmp_path / "host").path
    loaded = modules_of_process(*(word.format(state=state, host=host) for word in words))
    ours = {name for name in loaded if name.startswith("vmplug")}
    assert 20 < len(ours) <= most, sorted(ours)


def test_info_on_a_bundle_imports_no_hypervisor_and_no_journal(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"ociVersion": "1.0.2"}')
    loaded = modules_of_process("info", str(tmp_path))
    assert "msgspec" in loaded
    assert not loaded & {"asyncio", "rich", "sqlite3"}


def test_the_version_is_the_one_that_is_installed() -> None:
    done = subprocess.run([VMPLUG, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"vmplug {vmplug.__version__}\n"


def test_a_vm_in_memory_needs_no_qemu(tmp_path: Path) -> None:
    image = disk_image(tmp_path / "disk.img", 1, "of the example")
    info = vmplug.DeviceInfo(
        container_path="/dev/xvda", dev_type=vmplug.DevType.BLOCK, host_path=str(image)
    )
    machine = vmplug.FakeHypervisor()
    host = vmplug.HostRoot("/")
    with vmplug.DeviceManager.open(
        vm="sandbox-1", host=host, hypervisor=machine, state_dir=tmp_path / "state"
    ) as devices:
        first = devices.attach(info)
        again = devices.attach(info)
        assert (first.id, first.count, again.count) == (again.id, 1, 2)
        assert str(first.guest_address) == "PCI 10/00"
        assert first.container_path == "/dev/xvda"
        devices.detach(first.id)
        devices.detach(first.id)
        assert devices.attachments() == []
    assert not machine.monitor.nodes
