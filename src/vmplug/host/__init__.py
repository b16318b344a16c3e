"""2. What is that, on this host? May it be handed over?

In: `DeviceInfo`. Out: a `HostDevice` with the facts the kernel gives, and the findings of `check`.
Only this package reads /sys, /proc and /dev, all of it through `HostRoot`.
"""
