"""The one exception type that means: the input is wrong, and the message says how to mend it."""


class ZePTError(ValueError):
    """Bad input. The message says what was wanted, what came, in which file, and what to do."""
