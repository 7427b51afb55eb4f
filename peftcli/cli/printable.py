"""Text that comes from data or file names, made harmless for a terminal."""


def printable(text: str) -> str:
    """Text with control characters made visible, so that data can neither colour nor rewrite the terminal.

    >>> printable("a\\x1b[31mb")
    'a\\u241b[31mb'
    """
    return "".join(_visible(letter) for letter in text)


def _visible(letter: str) -> str:
    code = ord(letter)
    if letter == "\n" or code >= 0xA0 or 0x20 <= code < 0x7F:
        return "\ufffd" if 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069 or 0xD800 <= code < 0xE000 else letter
    return chr(0x2400 + code) if code < 0x20 else "\ufffd"
