"""A host in a file: everything that vmplug reads of it, recorded here and read elsewhere.

In: a `HostRoot`. Out: a tar file, and a `HostRoot` out of one.
"""
