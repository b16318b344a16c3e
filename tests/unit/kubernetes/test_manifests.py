"""What examples/kubernetes gives the plugin is what it needs, and it is all that it gets here."""

import asyncio
import configparser
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.command import ended
from tests.support.disks import disk_image, loop_device
from tests.support.kubelet import StandInKubelet
from vmplug.cli.verbs.device_plugin import command
from vmplug.journal import STATE_DIR_VARIABLE
from vmplug.kubernetes.config import read_config

EXAMPLES = Path(__file__).parents[3] / "examples/kubernetes"
DISKS = "example.com/disk"
CONFIG = "device-plugin.toml"

RUN = """
set -e
root=$1; shift
mount --make-rprivate /
for link in bin sbin lib lib64; do
    [ ! -L /$link ] || ln -s "$(readlink /$link)" "$root/$link"
done
while [ "$1" != -- ]; do
    [ -d "$1" ] && mkdir -p "$root$2" || { mkdir -p "$root${2%/*}"; : > "$root$2"; }
    mount --rbind "$1" "$root$2"
    [ "$3" != ro ] || mount -o remount,bind,ro "$root$2"
    shift 3
done
shift
exec chroot "$root" "$@"
"""
"""In a mount namespace of its own: what is bound, where, and how; then the command."""
PROGRAM = "import sys; sys.argv[0] = 'vmplug'; from vmplug.cli.main import run; run()"


def documents(name: str) -> list[Any]:
    return [*yaml.safe_load_all((EXAMPLES / name).read_text())]


def of_kind(kind: str) -> Any:
    (found,) = (one for one in documents("plugin.yaml") if one["kind"] == kind)
    return found


def pod() -> Any:
    return of_kind("DaemonSet")["spec"]["template"]["spec"]


def container() -> Any:
    (one,) = pod()["containers"]
    return one


def environment() -> dict[str, str]:
    return {one["name"]: one["value"] for one in container()["env"]}


def mounts() -> list[tuple[str, str, str]]:
    """Of the container: the path on the host, empty for the configuration; its own; ro or rw."""
    volumes = {volume["name"]: volume for volume in pod()["volumes"]}
    found = [
        (
            volumes.pop(mount["name"]).get("hostPath", {"path": ""})["path"],
            mount["mountPath"],
            "ro" if mount.get("readOnly") else "rw",
        )
        for mount in container()["volumeMounts"]
    ]
    assert not volumes
    return found


def lay_config(directory: Path) -> Path:
    """As kubelet lays a ConfigMap: a directory that everybody may write to, with links."""
    data = directory / "..2026_11_30"
    data.mkdir(parents=True)
    directory.chmod(0o1777)
    for name, text in of_kind("ConfigMap")["data"].items():
        (data / name).write_text(text)
        (data / name).chmod(0o644)
        (directory / name).symlink_to(f"..data/{name}")
    (directory / "..data").symlink_to(data.name)
    return directory


def test_its_configuration_and_its_mounts_agree(tmp_path: Path) -> None:
    config = read_config(lay_config(tmp_path / "config") / CONFIG)
    places = {inside: how for _, inside, how in mounts()}
    assert all(outside in {"", inside} for outside, inside, _ in mounts())
    assert places[config.plugin_directory] == places[config.cdi_directory] == "rw"
    assert places[os.path.dirname(config.pod_resources_socket)] == "ro"
    state_dir = os.path.dirname(environment()[STATE_DIR_VARIABLE])
    assert places[state_dir] == "rw"  # below it: kubelet makes it for everybody
    names = [volume["configMap"]["name"] for volume in pod()["volumes"] if "configMap" in volume]
    assert names == [of_kind("ConfigMap")["metadata"]["name"]]
    namespaces = {one["metadata"].get("namespace", "vmplug") for one in documents("plugin.yaml")}
    assert namespaces == {of_kind("Namespace")["metadata"]["name"]}
    selector = of_kind("DaemonSet")["spec"]["selector"]["matchLabels"]
    assert selector == of_kind("DaemonSet")["spec"]["template"]["metadata"]["labels"]


def test_a_pod_asks_for_what_is_offered(tmp_path: Path) -> None:
    config = read_config(lay_config(tmp_path / "config") / CONFIG)
    runtime, asking = documents("kata.yaml")
    assert asking["spec"]["runtimeClassName"] == runtime["metadata"]["name"]
    limits = asking["spec"]["containers"][0]["resources"]["limits"]
    assert limits.keys() <= {resource.name for resource in config.resources}


def test_the_unit_calls_what_there_is() -> None:
    unit = configparser.ConfigParser(interpolation=None)
    unit.read(EXAMPLES / "vmplug-device-plugin.service")
    program, verb, *arguments = shlex.split(unit["Service"]["ExecStart"])
    assert (program, verb) == ("/usr/local/bin/vmplug", "device-plugin")
    context = command.make_context(verb, arguments, resilient_parsing=True)
    name, state_dir = unit["Service"]["Environment"].split("=")
    assert Path(state_dir).parent == Path("/var/lib") / unit["Service"]["StateDirectory"]
    assert unit["Unit"]["ConditionPathExists"] == context.params["config"]
    assert environment() == {name: state_dir}
    assert name == STATE_DIR_VARIABLE


class Staged:
    """A host of which the container sees what the manifest mounts: one disk, and a kubelet."""

    def __init__(self, path: Path, kubelet: Path, disk: Path) -> None:
        self.root, self._kubelet = path / "root", kubelet
        self._places = path / "host"
        number = disk.stat().st_rdev
        udev = self.of("/run/udev") / "data"
        udev.mkdir(parents=True)
        name = udev / f"b{os.major(number)}:{os.minor(number)}"
        name.write_text("S:disk/by-id/nvme-one\n")
        self._config = lay_config(path / "config")
        self.root.mkdir()

    def of(self, path: str) -> Path:
        """The directory that stands for one of the host; of /dev and /sys there is only one."""
        if path in {"/dev", "/sys"}:
            return Path(path)
        if path.startswith("/var/lib/kubelet/"):
            return self._kubelet / Path(path).name
        found = self._places / path[1:]
        found.mkdir(parents=True, exist_ok=True)
        return found

    def command(self, *more: str, without: str = "") -> list[str]:
        """The manifest's, in a root that has Python, /proc and its mounts alone."""
        words = [str(self.root)]
        for place in dict.fromkeys((*self._program(), "/proc")):
            words += [place, place, "ro" if place != "/proc" else "rw"]
        for outside, inside, how in mounts():
            if inside != without:
                words += [str(self.of(outside)) if outside else str(self._config), inside, how]
        variables = {**environment(), "PYTHONPATH": os.pathsep.join(sys.path)}
        python = ["env", *(f"{name}={value}" for name, value in variables.items())]
        python += [sys.executable, "-c", PROGRAM]
        given = [*words, "--", *python, *container()["args"], *more]
        return ["unshare", "--mount", "sh", "-c", RUN, "sh", *given]

    @staticmethod
    def _program() -> Iterator[str]:
        yield from ("/usr", "/etc/ld.so.cache")  # where Python looks for libudev
        found = (sys.prefix, sys.base_prefix, *sys.path)
        yield from (path for path in found if os.path.isdir(path) and path[1:4] != "usr")


@pytest.fixture
def staged(tmp_path: Path) -> Iterator[Staged]:
    with (
        tempfile.TemporaryDirectory(prefix="k") as kubelet,  # the names of sockets are short
        loop_device(disk_image(tmp_path / "disk.img", 8, "x")) as disk,
    ):
        for name in ("device-plugins", "pod-resources"):
            (Path(kubelet) / name).mkdir()
        yield Staged(tmp_path, Path(kubelet), disk)


def begin(command: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.root
def test_with_the_mounts_of_the_manifest_a_pod_gets_a_disk(staged: Staged) -> None:
    async def play() -> None:
        async with StandInKubelet(staged.of("/var/lib/kubelet/device-plugins").parent) as kubelet:
            process = await asyncio.to_thread(begin, staged.command())
            try:
                await kubelet.wait_for(DISKS, allocatable=1)
                answer = await kubelet.admit("pod1", DISKS, 1)
            finally:
                process.terminate()
            done = await asyncio.to_thread(ended, process)
            assert done.status == 0, done.stderr
            (value,) = answer.annotations.values()
            assert value == f"{DISKS}=nvme-one"
            log = [json.loads(line) for line in done.stderr.splitlines()]
            warned = [line["message"] for line in log if line["level"] == "warning"]
            assert warned == []
            (spec,) = staged.of("/var/run/cdi").glob("*.yaml")
            assert "/dev/disk/by-id/nvme-one" in spec.read_text()
            assert (staged.of("/var/lib/vmplug") / "state/journal.db").is_file()
            assert list(kubelet.plugins.iterdir()) == [kubelet.socket]

    asyncio.run(play())


@pytest.mark.root
@pytest.mark.parametrize(
    ("without", "shown"),
    [
        ("", "free"),
        ("/run/udev", "selects nothing on this host"),
        ("/sys", "selects nothing on this host"),
        ("/dev", "cannot be opened: No such file or directory"),
        ("/etc/vmplug", "device-plugin.toml cannot be read: No such file"),
        ("/var/lib/kubelet/pod-resources", "kubelet does not say which pods have devices"),
    ],
)
def test_without_one_of_its_mounts_it_says_so(staged: Staged, without: str, shown: str) -> None:
    done = subprocess.run(
        [word for word in staged.command("--dry-run", without=without) if word != "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown in done.stdout + done.stderr
