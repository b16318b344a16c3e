"""Which devices may Kubernetes give to its pods, and who has them?

In: a configuration, this host, the journal, and a kubelet. Out: answers to kubelet; rows of the
journal, bindings, CDI files. Nothing of it is imported unless the device plugin is used.
"""

DEFAULT_CONFIG = "/etc/vmplug/device-plugin.toml"
