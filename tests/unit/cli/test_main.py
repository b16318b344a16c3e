"""The process `vmplug` before a verb has begun."""

import subprocess
import sys

CTRL_C_WHILE_IT_IMPORTS = """
import sys

class Finder:
    @staticmethod
    def find_spec(name, path, target=None):
        if name == "vmplug.cli.answer":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Finder)
from vmplug.cli.main import run
run()
"""


def test_ctrl_c_while_it_imports_prints_no_traceback() -> None:
    command = [sys.executable, "-c", CTRL_C_WHILE_IT_IMPORTS, "host"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
