"""How does a VM begin: its machine, its cold plug, its process.

In: a machine and plugs. Out: a command line, and a QEMU that runs.
"""
