"""What happens to the host devices that VMs have?

In: the journal and the host. Out: an event for each difference between two checks.
"""
