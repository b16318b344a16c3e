"""argv -> stdout, stderr, exit status: the installed `vmplug`, run as a user runs it."""
