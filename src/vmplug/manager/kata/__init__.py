"""Import devices that Kata Containers has plugged.

In: the state that its shim has saved. Out: records in our journal, and devices that were left out.
"""
