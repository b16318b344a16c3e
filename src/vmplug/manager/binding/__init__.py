"""Giving functions of the host to VFIO and back, and dividing them.

In: groups and physical functions. Out: what was done, with the journal knowing it beforehand.
"""
