"""Errors that end a run in one clear line."""


class UserError(Exception):
    """Something the user can mend: the message says what was wrong, with what value, and what to do."""
