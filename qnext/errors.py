"""The errors a caller can meet: each names the thing, the rule it broke, and the right way."""


class QnextError(ValueError):
    """Base of every error qnext raises on purpose."""


class ConfigError(QnextError):
    """A model configuration that is incomplete, contradictory, or of a model we do not know."""


class CheckpointError(QnextError):
    """A directory or file that is no checkpoint, or one that does not fit its own config."""


class InputError(QnextError):
    """Arguments of a model function that do not fit each other or the model."""


class DonatedError(InputError):
    """A tree that was given to a call for good, used again."""


def donated(path: str, taker: str | None = None) -> DonatedError:
    """The error for a leaf that was used after it was donated, to `taker` where that is known."""
    root = path.partition(".")[0].partition("[")[0]
    call = f"{taker}()" if taker else "the donating call"
    return DonatedError(
        f"{path} was donated to {taker or 'a call'} and its memory reused. Use the {root} that "
        f"{call} returned, or jit(..., donate=()) to keep both."
    )


class CapacityError(InputError):
    """More tokens than the state has room for; raised before anything is computed."""


class LoweringError(QnextError):
    """A function that cannot be traced or lowered as asked, or a compiled step called wrongly."""


class TargetError(QnextError):
    """A target nobody knows, or one that this machine, its chip or its software is not."""
