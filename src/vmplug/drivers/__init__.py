"""3. Which steps plug it, and which undo them?

In: a `HostDevice` and the requested options. Out: a `Plug`, with its place in the VM. Arithmetic
only: nothing here reads the host or a VM.
"""
