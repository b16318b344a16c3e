"""`--device` and `-o`, a line each: the device first, then its options."""

import os
from contextlib import suppress

from tests.fuzz.guard import changes_only
from tests.fuzz.spec import check_request
from tests.support.requests import with_options
from vmplug.cdi.problem import UnresolvableDevices
from vmplug.cli.device import names_cdi_device, parse_cdi_names, parse_device
from vmplug.cli.options import parse_function
from vmplug.errors import HostError, SpecError
from vmplug.host.cdi.find import find_cdi_devices
from vmplug.host.root import HostRoot

NOWHERE = HostRoot("/dev/null/host")
"""A host without mounts: `find` asks each file system that may not answer, such as FUSE."""


def check(data: bytes) -> None:
    """Any argument is an error or a request; argv holds no NUL, and bytes as they are."""
    text, *options = os.fsdecode(data.replace(b"\0", b"")).split("\n")
    with changes_only(), suppress(SpecError, HostError):
        request = parse_device(text)
        assert parse_device(text) == request
        said = dict(option.partition("=")[::2] for option in options)
        check_request(with_options(request, said))
    if names_cdi_device(text):
        with changes_only(), suppress(SpecError, UnresolvableDevices):
            find_cdi_devices(parse_cdi_names([text]), NOWHERE, ["/dev/null/cdi"])
            raise AssertionError(f"{text!r} is a device of no spec")
    with suppress(SpecError):
        assert str(parse_function(text)).endswith(text.lower())
