"""Leases: which process has which devices of the host, until it ends?

Requests and a process come in. The devices come out as values for its command line, with open
files to inherit. A lease is a row of the journal's table of VMs: the process is what a QEMU is to
a VM, and `LeaseHolder` is its hypervisor. So the manager resolves, checks, journals and undoes.
"""
