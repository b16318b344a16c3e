"""Which commands plug a device of each kind, and which take it back?

In: a plug and its place. Out: steps, each with its undo. Nothing is sent.
"""
