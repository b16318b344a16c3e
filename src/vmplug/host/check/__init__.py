"""May it be handed over? Every reason against it.

In: a `HostDevice`. Out: `Finding`s, each with its remedy. Nothing is changed.
"""
