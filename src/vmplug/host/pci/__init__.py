"""PCI functions, IOMMU groups and VFIO drivers.

In: addresses, UUIDs and VFIO nodes. Out: `PciFunction` and `VfioGroup`; this package also changes
drivers, virtual functions and mediated devices.
"""
