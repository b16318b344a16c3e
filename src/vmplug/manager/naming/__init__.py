"""Which devices of this host have names for containers?

In: the host, and the policy that says what may be handed over. Out: files of CDI that name it.
"""
