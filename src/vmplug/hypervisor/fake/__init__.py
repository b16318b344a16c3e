"""A QEMU that is none: for tests, ours and those of programs that use vmplug.

In: the QMP commands that vmplug sends. Out: what QEMU would answer, and failures on demand.
"""
