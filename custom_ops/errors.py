"""Base of every error this package raises on purpose."""


class TriangleMixError(Exception):
    """What was wrong, the value, what to do: one line that a command line can print as it is."""


class ConfigurationError(TriangleMixError, ValueError):
    """A parameter is out of its range."""


class WeightsError(TriangleMixError):
    """A Hugging Face folder whose weights are not whole, or not those of its configuration."""
