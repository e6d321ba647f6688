"""Errors that a person can mend. A command that meets one prints it and ends with status 2."""


class EgmError(Exception):
    """Something that the user can mend. The message says what is wrong, where, and what to do."""


class InputError(EgmError, ValueError):
    """A value or a file that cannot be used."""
