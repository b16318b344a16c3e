"""QEMU: into a running one, and onto the command line of one that is about to start.

In: plugs and places. Out: what was plugged, and where the guest sees it.
"""
