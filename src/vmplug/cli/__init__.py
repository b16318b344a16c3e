"""The command line: one verb per arrow of the flow, and the only place that wires all of it."""
