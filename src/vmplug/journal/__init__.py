"""What is remembered: VMs, what they have, who holds it, and what was bound for them.

In: decisions, before they are carried out. Out: records that survive any crash. It knows nothing
of who decides.
"""

DEFAULT_STATE_DIR = "/run/vmplug"
