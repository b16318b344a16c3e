"""The life of VMs: start, adopt, connect, stop; and what concerns several VMs at once.

Each function opens the journal below `state_dir`, does one thing, and closes it. It may be called
from any thread and any process of the host. `host` is the running one unless another is passed.
"""
