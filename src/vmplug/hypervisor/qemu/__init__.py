"""QEMU: into a running one, and onto the command line of one that is about to start.

In: plugs and places. Out: plugged devices, and their guest addresses.
"""
