"""PCI functions, IOMMU groups and VFIO: what is handed over whole, and by which driver.

In: addresses, UUIDs and nodes of VFIO. Out: `PciFunction` and `VfioGroup`; drivers, virtual
functions and mediated devices are changed here.
"""
