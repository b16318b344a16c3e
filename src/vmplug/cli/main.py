"""The process `vmplug`."""

import gc
import os
import sys
from typing import NoReturn


def run() -> NoReturn:
    """Entry point: run the verb and end the process at once.

    Everything that must be closed is closed already. An orderly end of the interpreter would
    cost 10 ms, as much as all that `vmplug resolve` does.
    """
    gc.disable()  # a verb is over before there is garbage
    try:
        from vmplug.cli.answer import answer  # noqa: PLC0415  2 ms: nothing collects meanwhile

        status = answer(sys.argv[1:])
    except KeyboardInterrupt:  # nothing has begun: a verb that has says what it leaves
        status = 130  # 128 and the number of SIGINT
    os._exit(status)
