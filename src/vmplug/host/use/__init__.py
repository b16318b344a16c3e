"""Who uses a thing of the host? Processes and network namespaces, each looked through once.

In: device nodes, names of devices. Out: who has them, and who could not be looked into.
"""
