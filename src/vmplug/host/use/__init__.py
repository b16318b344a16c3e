"""What uses a thing of the host? Processes and network namespaces, each read once.

In: device nodes, names of devices. Out: what has them, and which processes could not be read.
"""
