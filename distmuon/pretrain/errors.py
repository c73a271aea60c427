"""The exceptions that end a run with a sentence."""


class UserError(ValueError):
    """A mistake in the settings or the data, told in one sentence.

    The message names the value found, what was wanted and the way out; a program prints it without a
    traceback.
    """


class AgreedError(UserError):
    """A `UserError` that every process of the run raises, so that one of them need print it."""


class RankLost(RuntimeError):  # noqa: N818 - what happened, and no mistake of this rank
    """Another rank of the run ended or stalled, told in one sentence that says where this one was.

    The process group is of no use after it: the process should end, and the run go on from its last checkpoint.
    """
