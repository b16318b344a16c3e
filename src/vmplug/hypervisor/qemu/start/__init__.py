"""How does a VM start: its machine, its cold plug, its process.

In: a machine and plugs. Out: a command line, and a QEMU that runs.
"""
