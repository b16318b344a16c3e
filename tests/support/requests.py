"""Requests of any kind with something changed."""

from collections.abc import Mapping

from msgspec import structs

from vmplug.oci.info import DeviceInfo
from vmplug.oci.requests import Request


def with_options(request: Request, options: Mapping[str, str]) -> Request:
    """The request with these options of its driver, and no others."""
    if isinstance(request, DeviceInfo):
        return request._replace(driver_options=options)
    return structs.replace(request, driver_options=options)
