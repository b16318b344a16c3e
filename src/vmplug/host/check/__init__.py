"""May it be handed over? Everything that speaks against it.

In: a `HostDevice`. Out: `Finding`s, each with its remedy. Nothing is changed.
"""
