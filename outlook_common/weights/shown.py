"""Names from files, safe to print: what could steer a terminal, or look like another letter, is escaped."""


def shown(name: object) -> str:
    """Return a name as it may be printed, anything but plain ASCII as its escape."""
    text = str(name)
    return text if text.isascii() and text.isprintable() else ascii(text)[1:-1]
