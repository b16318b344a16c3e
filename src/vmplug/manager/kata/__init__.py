"""Taking over what Kata Containers has plugged.

In: the state that its shim has saved. Out: records in our journal, and what could not be.
"""
