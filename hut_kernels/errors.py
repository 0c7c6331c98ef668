"""The one exception type of the package's own."""


class HUTBackendError(RuntimeError):
    """A backend or a kind of weight that cannot be used here; the message names what is missing."""
