"""A host in a file: what vmplug reads of it, written down and read again elsewhere.

In: a `HostRoot`. Out: a tar file, and a `HostRoot` out of one.
"""
