"""The conversation with QEMU: one socket, taken in turns.

In: commands. Out: answers of a checked shape, events, and errors of ours.
"""
