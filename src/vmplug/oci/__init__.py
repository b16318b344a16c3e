"""1. What does the container ask for?

In: the bytes of an OCI runtime configuration. Out: a `Bundle` of `DeviceInfo`. Nothing here reads
the host's devices.
"""
