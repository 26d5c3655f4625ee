"""How a script fails: in one line that says what is wrong and what to do."""


class UserError(Exception):
    """What the user can mend. Exit code 2."""


class RunFailure(Exception):
    """What ended a run that had begun well. Exit code 1: the same command goes on."""


def check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def one_line(error: Exception) -> str:
    """What an exception of a library says, for a message of one line."""
    return " ".join((str(error).strip() or type(error).__name__).split())[:300]
