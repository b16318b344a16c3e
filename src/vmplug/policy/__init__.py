"""What does the operator allow?

In: a file of rules, and what is to be handed over. Out: refusals, and what `--allow` may overrule.
"""

DEFAULT_POLICY = "/etc/vmplug/policy.toml"
