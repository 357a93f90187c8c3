"""What can be wrong with what a user hands in."""


class ConfigError(ValueError):
    """A configuration field is missing or wrong; the message names it and what would be right."""


class CheckpointError(ValueError):
    """A checkpoint can't be read as the model that its configuration describes."""


class TokenizerError(ValueError):
    """A tokenizer can't be read, trained or used as asked; the message is one line."""
