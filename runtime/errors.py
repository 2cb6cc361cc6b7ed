"""What can go wrong when an exported folder is run."""

from trianglemix.custom_ops.errors import TriangleMixError


class FolderError(TriangleMixError):
    """A file of the exported folder is missing or cannot be used."""


class MissingPackageError(TriangleMixError):
    """An optional package is not installed."""


class ProviderError(TriangleMixError):
    """The execution provider asked for cannot be had."""


class FallbackError(TriangleMixError):
    """Only the slow function body could run, which was not allowed or would not fit in memory."""


class PromptError(TriangleMixError, ValueError):
    """A prompt or a setting of the generation is out of its range."""


class ExecutionError(TriangleMixError):
    """The device's runtime reported an error while it loaded or ran the model."""
