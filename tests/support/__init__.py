"""What tests and benchmarks stand on: disks of the host, a QEMU of their own, a second reader."""
