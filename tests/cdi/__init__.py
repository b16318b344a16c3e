"""CDI's rules as a table of cases: what vmplug, and what Debian's Go library, makes of each.

A case is files, the names that are asked for and an OCI config; its verdict is a result, or what
is refused and where. docs/cdi.md lists the differences between vmplug and the libraries.
"""
