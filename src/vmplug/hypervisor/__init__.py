"""4. How does QEMU do that, and where will the guest see it?

In: drives and places. Out: QMP commands, each with its undo, and the VM's answers. Only this
package connects to QEMU.
"""
