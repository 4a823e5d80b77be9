"""What ends a run on purpose: bad input of the user, or a request to stop."""

from __future__ import annotations

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # as shells report a Ctrl-C
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again, the run can be resumed


class UserError(ValueError):
    """Bad input: one line that names what is wrong, where, and the remedy. Entry scripts exit with 2."""


class DataGone(UserError):  # noqa: N818 - as Stopped
    """The images are out of reach, for no fault of the run's. Entry scripts exit with 75."""


class Stopped(Exception):  # noqa: N818 - a request that was met, not an error
    """The run saved a checkpoint and stopped because it was asked to. Entry scripts exit with 75."""
