"""The one exception that a user's mistake raises."""


class UserError(ValueError):
    """A mistake in the settings or the data, told in one sentence.

    The message names the value found, what was wanted and the way out; a program prints it without a
    traceback.
    """
