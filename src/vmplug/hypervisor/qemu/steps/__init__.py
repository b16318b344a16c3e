"""Which commands plug a device of each kind, and which undo them?

In: a plug and its place. Out: steps, each with its undo. Nothing is sent.
"""
