"""3. What must be plugged, and what undone?

In: a `HostDevice` and how it is wanted. Out: a `Plug`, with its place in the VM. Arithmetic only:
nothing here touches the host or a VM.
"""
