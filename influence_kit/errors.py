"""Errors that end a run in one clear line."""


class UserError(Exception):
    """Something the user can mend: the message says what was wrong, with what value, and what to do."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line: its message's first, or its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
