"""Block devices: disks, images, loops, persistent memory, and their users.

In: numbers and paths. Out: `BlockDevice` and `DiskFile`, and what the host does with them.
"""
