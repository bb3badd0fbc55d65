"""The errors a caller can meet: each names the thing, the rule it broke, and the right way."""


class QnextError(ValueError):
    """Base of every error qnext raises on purpose."""


class ConfigError(QnextError):
    """A model configuration that is incomplete, contradictory, or of a model we do not know."""


class CheckpointError(QnextError):
    """A directory or file that is no checkpoint, or one that does not fit its own config."""


class InputError(QnextError):
    """Arguments of a model function that do not fit each other or the model."""


class CapacityError(InputError):
    """More tokens than the state has room for; raised before anything is computed."""
