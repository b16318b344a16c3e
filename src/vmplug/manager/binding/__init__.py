"""Bind functions of the host to VFIO and give them back, and create virtual ones.

In: groups and physical functions. Out: the results; the journal records each step first.
"""
