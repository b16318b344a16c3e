"""Each mistake in a configuration is one sentence, with what to do."""

from pathlib import Path

import pytest

from vmplug.errors import PolicyError
from vmplug.kubernetes.config import Config, Given, Managed, read_config

NAME = 'name = "a.com/b"'
PCI = 'pci = ["8086:*"]'


def read(tmp_path: Path, text: str) -> Config:
    file = tmp_path / "config.toml"
    file.write_text(text)
    file.chmod(0o644)
    return read_config(file)


def test_every_key(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        f"""
kubelet-directory = "/k"
cdi-directory = "/c"
reconcile-seconds = 5
metrics = "[::1]:9808"
[[resource]]
{NAME}
{PCI}
classes = ["0x02"]
drivers = ["vfio-pci"]
numa = [0, 1]
given = "cdi-cri"
managed = "start"
pci-resource-env = true
""",
    )
    (resource,) = config.resources
    assert (resource.given, resource.managed) == (Given.CDI_CRI, Managed.START)
    assert resource.drivers == frozenset({"vfio-pci"})
    assert resource.numa == frozenset({0, 1})
    assert config.plugin_directory == "/k/device-plugins"
    assert config.pod_resources_socket == "/k/pod-resources/kubelet.sock"
    assert (config.cdi_directory, config.reconcile_s) == ("/c", 5)
    assert str(config.metrics) == "[::1]:9808"


def test_the_page_has_a_configuration_that_is_right(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs/kubernetes.md").read_text()
    text = page.partition("```toml\n")[2].partition("```")[0]
    names = [resource.name for resource in read(tmp_path, text).resources]
    assert names == ["example.com/gpu", "example.com/disk"]


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("", "has no [[resource]], so there is nothing to offer"),
        ("[[resource]]\n" + NAME, "names no devices: add pci, classes, drivers or paths"),
        (f"[[resource]]\n{NAME}\n{PCI}\ncolour = 1", "unknown field colour"),
        (f"[[resource]]\n{NAME}\n{PCI}\ngiven = 'cri'", "'cri' is not one of nodes, cdi-annot"),
        (f"[[resource]]\n{NAME}\n{PCI}\nmanaged = 'yes'", "'yes' is not one of start, pre-start"),
        (f"[[resource]]\n{NAME}\npci = ['intel']", "'intel' is not a PCI ID"),
        (f"[[resource]]\n{NAME}\npaths = ['sda']", "'sda' cannot match a path"),
        (f"[[resource]]\n{NAME}\n{PCI}\nnuma = [-1]", "is wrong at resource[0].numa[0]"),
        (f"[[resource]]\n{NAME}\n{PCI}\npaths = ['/dev/sda']", "either block devices or PCI"),
        (f"[[resource]]\n{NAME}\npaths = ['/dev/sda']\nmanaged = 'start'", "paths and managed"),
        (f"[[resource]]\nname = 'gpu'\n{PCI}", "write a domain in small letters"),
        (f"[[resource]]\nname = 'A.com/gpu'\n{PCI}", "write a domain in small letters"),
        (f"[[resource]]\nname = 'a.com/{'x' * 64}'\n{PCI}", "at most 63 letters"),
        (f"[[resource]]\nname = 'requests.a.com/gpu'\n{PCI}", "no domain that begins with"),
        (f"[[resource]]\nname = '{'a.' * 100}com/gpu'\n{PCI}", "longer than 200 characters"),
        (f"[[resource]]\nname = 'kubernetes.io/gpu'\n{PCI}", "Kubernetes' own"),
        (f"[[resource]]\nname = 'x.k8s.io/gpu'\n{PCI}", "Kubernetes' own"),
        (f"[[resource]]\n{NAME}\n{PCI}\n" * 2, "has two resources named 'a.com/b'"),
        (
            f"[[resource]]\nname='a.com/b-c'\n{PCI}\n[[resource]]\nname='a.com/b_c'\n{PCI}",
            "a container sees both as PCIDEVICE_A_COM_B_C",
        ),
        (f"reconcile-seconds = 0.5\n[[resource]]\n{NAME}\n{PCI}", "reconcile-seconds"),
        (
            f"metrics = 'localhost:9808'\n[[resource]]\n{NAME}\n{PCI}",
            "wrong at metrics: 'local",
        ),
        (f"metrics = '[::1]'\n[[resource]]\n{NAME}\n{PCI}", "such as '127.0.0.1:9808'"),
        (f"metrics = '127.1:80'\n[[resource]]\n{NAME}\n{PCI}", "such as '127.0.0.1:9808'"),
        (f"metrics = '[::1]:65536'\n[[resource]]\n{NAME}\n{PCI}", "such as '127.0.0.1:9808'"),
        (f"kubelet-directory = 'k'\n[[resource]]\n{NAME}\n{PCI}", "is not an absolute path"),
        ("[[resource", "is not TOML"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, lines: str, sentence: str) -> None:
    with pytest.raises(PolicyError) as caught:
        read(tmp_path, lines)
    assert sentence in caught.value.message
    assert "\n" not in caught.value.message
    assert "docs/kubernetes.md" in str(caught.value.hint)


def test_a_file_that_is_not_there_says_which_option_names_another(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="cannot be read: No such file") as caught:
        read_config(tmp_path / "absent.toml")
    assert "--config" in str(caught.value.hint)


def test_a_file_that_everybody_may_write_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f"[[resource]]\n{NAME}\n{PCI}\n")
    file.chmod(0o666)
    with pytest.raises(PolicyError, match="vmplug refuses to use it"):
        read_config(file)
