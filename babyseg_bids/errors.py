"""The errors that babyseg raises, each with the exit code that the command line gives it."""


class BabySegError(Exception):
    """Base of all errors; the message says what happened, to which file, and what to do."""

    exit_code = 1


class UsageError(BabySegError):
    """An option, a path or a settings file that cannot be used."""

    exit_code = 2


class NoInputError(BabySegError):
    """Nothing in the dataset matches what was asked for."""

    exit_code = 3


class InputError(BabySegError):
    """An image or a table that cannot be read or used."""


class ModelError(BabySegError):
    """Weights that are missing, damaged or of another format."""


class AlignmentError(BabySegError):
    """Two scans of a session that could not be aligned."""


class OutputError(BabySegError):
    """A result that could not be written."""

    exit_code = 2
