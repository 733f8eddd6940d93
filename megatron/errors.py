"""What a user can mend: each kind of mistake is a class, whose one line the command lines print before they end."""


class UserError(ValueError):
    """A mistake that the user can mend; the message names what was found, what was expected and the remedy."""

    exit_status = 2


class ConfigError(UserError):
    """A flag, or a combination of flags, that cannot be honoured; the message names flag, value and remedy."""


class ConfigFileError(ConfigError):
    """A file of flags that cannot be used; the message names the file, the key and the remedy."""


class DataError(UserError):
    """Data that cannot be used; the message names the file, what was found and what to do."""


class VocabError(UserError):
    """A vocabulary file that cannot be used; the message names the file, the line and the remedy."""


class ResidueError(UserError):
    """A text that is not a protein; the message names the column and what stands there."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read or does not fit the run; the message names the file and the remedy."""


class SaveError(CheckpointError):
    """A checkpoint that the disk refuses; the message names folder, what is to be freed and the remedy."""

    exit_status = 4


class OutputError(UserError):
    """A file of a run that cannot be written; the message names it, the flag and the remedy."""


class LaunchError(UserError):
    """What the launcher says, or leaves out, does not let the ranks find each other or their devices."""


class DivergedError(UserError):
    """A run whose steps go wrong again and again: to start it again would only repeat that."""

    exit_status = 3
