"""vmplug: hand host devices to containers that run inside virtual machines.

    config.json -> oci -> DeviceInfo -> host -> HostDevice + findings -> drivers -> Plug
                -> hypervisor -> GuestAddress;  manager counts and journals;  vms, cli on top

The public names are in `__init__.pyi`, for type checkers and for this module alike. Each is
imported when it is first used, so that `import vmplug` costs next to nothing.
"""

__version__ = "0.1.0"

_module_of: dict[str, str] = {}


def _find_modules() -> dict[str, str]:
    """The module of each public name."""
    if not _module_of:
        import re  # noqa: PLC0415  10 ms that `import vmplug` need not pay
        from pkgutil import get_data  # noqa: PLC0415  5 ms, the same

        stub = (get_data(__name__, "__init__.pyi") or b"").decode()
        found = re.findall(r"^from (vmplug[\w.]*) import \(?\s*(\w+) as \2\b", stub, re.MULTILINE)
        _module_of.update((name, module) for module, name in found)
    return _module_of


def __getattr__(name: str) -> object:
    """Import a public name when it is first used. Source: PEP 562."""
    if name == "__all__":
        return ("__version__", *_find_modules())
    if name.startswith("_") or name not in _find_modules():
        raise AttributeError(f"module 'vmplug' has no attribute {name!r}")
    from vmplug.arguments import checked  # noqa: PLC0415  when the first name is used

    value: object = checked(getattr(__import__(_find_modules()[name], fromlist=[name]), name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(("__version__", *_find_modules()))
