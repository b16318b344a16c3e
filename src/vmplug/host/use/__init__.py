"""What uses a thing of the host? Open files, mounts and namespaces of all processes.

In: what files and devices are. Out: what has them, and which processes could not be read.
"""
