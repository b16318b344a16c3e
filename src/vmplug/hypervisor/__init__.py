"""4. How does QEMU do that, and where will the guest see it?

In: drives and places. Out: QMP commands, each with its undo, and what the VM said. Only this
package talks to QEMU.
"""
