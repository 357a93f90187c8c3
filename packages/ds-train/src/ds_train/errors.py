"""What can go wrong for reasons a person can fix: each message is one line."""


class TrainError(Exception):
    """Base of every error that `ds-train` reports with one line and exit code 2."""


class TrainConfigError(TrainError, ValueError):
    """A setting is unknown or has a bad value; names field, value and what would be right."""


class DataError(TrainError):
    """There is no text to train on, or a token file does not fit the run."""


class CheckpointError(TrainError):
    """A checkpoint is damaged, belongs to another run, or could not be written."""
