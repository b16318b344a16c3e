"""Which devices of this host does a CDI name stand for?

In: names, of a bundle or of the command line, and the specs of the host. Out: requests.
"""
