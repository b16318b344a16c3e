"""Which processes may have a device of VFIO, whatever they do against being asked?"""

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.locked_memory import locked_memory
from vmplug.host.root import THIS_HOST
from vmplug.host.use.mapped import find_vfio_users
from vmplug.host.use.silent import answer_within

_PATIENCE_S = 5.0


@pytest.mark.root
def test_a_process_that_cannot_be_asked_may_have_a_device_and_is_not_waited_for(
    tmp_path: Path,
) -> None:
    with locked_memory(tmp_path) as pid:
        found = answer_within(60, lambda: find_vfio_users(THIS_HOST))
        assert found is not None, "it waits"
        users = {one.pid for one in found}
        assert (pid in users) is not _shows_its_mappings(pid)
        assert os.getppid() not in users


def _shows_its_mappings(pid: int) -> bool:
    """So it does on Linux 6.18, which reads them without the lock; 6.12 does not."""
    reader = subprocess.Popen(["cat", f"/proc/{pid}/maps"], stdout=subprocess.DEVNULL)
    try:
        return reader.wait(_PATIENCE_S) == 0
    except subprocess.TimeoutExpired:
        reader.kill()
        reader.wait()
        return False
