"""The life of VMs: start, adopt, connect, stop; and what concerns several VMs at once.

Each function opens the journal of its `Setup`, does one thing, and closes it. It may be called
from any thread and any process of the host. Without a `Setup` it serves this host.
"""
