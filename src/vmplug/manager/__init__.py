"""The life of a device: who holds it, where it is plugged, what is remembered.

In: requests and a `Hypervisor`. Out: `Attachment` values and a journal that survives any crash.
"""
