"""What came out of a run of `vmplug`."""

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Result:
    """What a run said, and its exit status or minus the number of the signal that ended it."""

    stdout: str
    stderr: str
    status: int

    def json(self) -> Any:
        """The one document of version 1 that stdout holds; nothing may be on stderr."""
        assert self.stderr == "", self
        document = json.loads(self.stdout)
        assert document.pop("version") == 1, self
        return document

    def answer(self) -> str:
        """The text of a verb that went well."""
        assert (self.stderr, self.status) == ("", 0), self
        return self.stdout

    def error(self) -> dict[str, Any]:
        """The one error object of version 1 that stderr holds; nothing may be on stdout."""
        assert self.stdout == "", self
        document = json.loads(self.stderr)
        assert document.keys() == {"version", "error"}, self
        assert document["version"] == 1, self
        error: dict[str, Any] = document["error"]
        assert error.keys() == {"code", "message", "hint", "facts"}, self
        return error
