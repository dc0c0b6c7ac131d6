"""The one exception of this package."""


class ConversionError(ValueError):
    """A source that cannot be converted, or a conversion that did not hold.

    The message says what was found, what was expected and what to do.
    """
