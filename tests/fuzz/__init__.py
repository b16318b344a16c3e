"""Hostile input, made by machines: what comes out is an answer or one of vmplug's own errors.

Each target is one module and one function of bytes, the property. Hypothesis calls it with a few
inputs in `test_properties.py`, atheris with as many as the time allows: `make fuzz SECONDS=600`,
or `python -m tests.fuzz TARGET`. What broke one is kept in build/fuzz, and
`python -m tests.fuzz TARGET --input FILE` shows it again.
"""
