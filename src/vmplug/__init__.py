"""vmplug: hand host devices to containers that run inside virtual machines."""
