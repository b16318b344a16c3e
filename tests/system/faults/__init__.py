"""The fault matrix: every step of every operation with every kind, and one fault at each.

An operation runs in a process of its own. What it does is seen from outside: its QMP commands and
events pass through a `Conductor` on the VM's socket, and it halts before and after each journal
transaction, write to sysfs and start of a daemon until the conductor lets it go on. A first run
without a fault gives the steps; then each step gets each fault, another process recovers, and the
journal, the VM and the host are compared with what they were.
"""
