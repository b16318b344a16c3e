"""What is a thing of this host, what is it made of, and who uses it?

In: the name of a thing, and the claims of VMs. Out: a `Thing`, a tree. Nothing is changed.
"""
