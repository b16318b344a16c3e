"""The lab VM: a throw-away machine with a real kernel, a real IOMMU and devices to hand over."""
