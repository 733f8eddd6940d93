"""The errors that a user can fix; the command-line programs print the message, one line, and end with `exit_status`."""


class UserError(ValueError):
    """A mistake that the user can fix; the message says what was found, what was expected and the remedy."""

    exit_status = 2
    is_told = False  # a rank has printed it already


class ConfigError(UserError):
    """A flag, or a combination of flags, that cannot be honoured; the message names flag, value and remedy."""


class ConfigFileError(ConfigError):
    """A file of flags that cannot be used; the message names the file, the key and the remedy."""


class DataError(UserError):
    """Data that cannot be used; the message names the file, what was found and what to do."""


class VocabError(UserError):
    """A vocabulary file that cannot be used; the message names the file, the line and the remedy."""


class ResidueError(UserError):
    """A text that is not a protein; the message names the column and the character found there."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read or does not fit the run; the message names the file and the remedy."""


class SaveError(CheckpointError):
    """A checkpoint that the disk refuses; the message names the folder, the space needed and the remedy."""

    exit_status = 4


class OutputError(UserError):
    """A file of a run that cannot be written; the message names it, the flag and the remedy."""


class LaunchError(UserError):
    """Launcher settings, given or missing, with which the ranks cannot find each other or their devices."""


class DivergedError(UserError):
    """A run that ended because its steps kept going wrong; starting it again unchanged would only repeat that."""

    exit_status = 3
