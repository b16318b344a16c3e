"""The life of a device: its holds, its place, its records.

In: requests and a `Hypervisor`. Out: `Attachment` values and a journal that survives any crash.
"""

UNPLUG_TIMEOUT_S = 15.0
"""A Linux guest releases a disk within 0.1 s; one that is busy booting within a few seconds."""
