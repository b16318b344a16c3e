"""Text that came from outside, made fit for one line of a terminal."""


def join_hint(message: str, hint: str | None) -> str:
    """A message with its remedy, for a log of single lines."""
    return "; ".join(filter(None, (message, hint)))


def one_line(text: str) -> str:
    """`text` with everything escaped that is not printable: newlines, escape sequences, ..."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )
