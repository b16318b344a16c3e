"""What is collected: the tests of the lab only in the lab. What tests note is below build."""

import os

os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", "build/hypothesis")
collect_ignore = [] if "LAB_VM" in os.environ else ["lab"]
