"""The connection to QEMU: one socket, used in turns.

In: commands. Out: answers of a checked shape, events, and vmplug's errors.
"""
