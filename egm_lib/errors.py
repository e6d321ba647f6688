"""Errors that a person can mend. Every command ends on them with one sentence and exit status 2."""


class EgmError(Exception):
    """Something that the user can mend; the message says what is wrong, where, and how."""


class InputError(EgmError, ValueError):
    """A value or a file that cannot be used."""
