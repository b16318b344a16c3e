"""An in-memory QEMU for tests, ours and those of programs that use vmplug.

In: the QMP commands that vmplug sends. Out: the answers of QEMU, and failures on demand.
"""
