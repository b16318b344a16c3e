"""One behaviour, held by the hypervisor in memory and by real QEMU."""
