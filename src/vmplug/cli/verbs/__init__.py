"""The verbs, one a module: what `vmplug VERB` asks the library, and prints.

In: arguments. Out: an answer on stdout, through `render`. A module is imported when its verb is
used.
"""
