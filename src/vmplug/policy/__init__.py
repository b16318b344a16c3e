"""What does the operator allow?

In: a file of rules, and the devices of a request. Out: refusals, and what `--allow` may overrule.
"""

DEFAULT_POLICY = "/etc/vmplug/policy.toml"
