"""The exceptions that a user's mistake raises."""


class UserError(ValueError):
    """A mistake in the settings or the data, told in one sentence.

    The message names the value found, what was wanted and the way out; a program prints it without a
    traceback.
    """


class AgreedError(UserError):
    """A `UserError` that every process of the run raises, so that one of them need print it."""
