"""The failures of a script: one line that says what is wrong and what to do."""


class UserError(Exception):
    """A mistake that the user can mend. Exit code 2."""


class RunFailure(Exception):
    """A run that failed after a valid start. Exit code 1: the same command resumes it."""


def check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def one_line(error: Exception) -> str:
    """Return the text of a library's exception, for a message of one line."""
    return " ".join((str(error).strip() or type(error).__name__).split())[:300]
