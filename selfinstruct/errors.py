"""One tree of errors. Each says what went wrong, what was seen, where, and (``hint``) the command that helps.

::

    SelfInstructError                     exit code
    ├── UsageError                        2   a flag, config key or input file is wrong
    │   ├── SeedFileError                     lists every bad line
    │   └── IdentityError                     OUT holds a run with other settings
    ├── EnvironmentFault                  3   key, package, server, disk
    │   ├── MissingKey
    │   ├── MissingPackage
    │   ├── ModelFileError                    weights missing, damaged or unknown
    │   ├── ServerError                       a server of ours did not come up
    │   ├── OutputError                       OUT cannot be used
    │   │   ├── RunLocked                     another process works on it
    │   │   └── DamagedFile                   a file of the run or dataset is not what was written
    │   └── TeacherFault                      the endpoint will not serve us, whatever we retry
    │       ├── TeacherUnreachable
    │       ├── AuthenticationFailed
    │       ├── QuotaExhausted
    │       └── ModelNotFound
    ├── Stopped                           4   ended early, resumable: a limit, saturation, an outage
    ├── TransientFault                    4   retryable: busy, rate limit, lost connection, unreadable answer
    │   ├── RateLimited                       carries the wait that the server asked for
    │   └── UnusableAnswer                    a proper answer with nothing in it
    ├── PromptRefused                     4   this prompt will never be answered; skip and count it
    └── GivenUp                           4   this prompt was not answered while others were; asked again on resume
"""

from __future__ import annotations

from collections.abc import Sequence


class SelfInstructError(Exception):
    """Base of all errors that a user can meet.

    ``hint`` is the remedy (often a command to type), ``retryable`` says whether the same request may succeed later,
    ``exit_code`` is the process exit status.
    """

    exit_code = 1
    retryable = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message


class UsageError(SelfInstructError):
    """A flag, a config key or an input file is wrong."""

    exit_code = 2


class SeedFileError(UsageError):
    """A seed file has bad lines; ``problems`` holds one text a line, ``file:line: what; remedy``."""

    def __init__(self, message: str, problems: Sequence[str], *, hint: str = "") -> None:
        super().__init__("\n".join([message, *problems]), hint=hint)
        self.problems = tuple(problems)


class IdentityError(UsageError):
    """The folder holds a run whose settings would give other rows."""


class EnvironmentFault(SelfInstructError):
    """Something outside the program must be mended first."""

    exit_code = 3


class MissingKey(EnvironmentFault):
    """The environment variable that should hold the API key is not set."""


class MissingPackage(EnvironmentFault):
    """An optional package is needed and not installed."""


class ModelFileError(EnvironmentFault):
    """Model weights are missing, damaged or unknown."""


class ServerError(EnvironmentFault):
    """A server that we start did not come up, or went away."""


class OutputError(EnvironmentFault):
    """The output folder or a file in it cannot be used."""


class RunLocked(OutputError):
    """Another process is working on this run."""


class DamagedFile(OutputError):
    """A file of the run or of the dataset is not what was written."""


class TeacherFault(EnvironmentFault):
    """The teacher's endpoint will not serve us, whatever is retried."""


class TeacherUnreachable(TeacherFault):
    """No connection to the teacher's endpoint."""


class AuthenticationFailed(TeacherFault):
    """The endpoint refuses the key."""


class QuotaExhausted(TeacherFault):
    """The account behind the key has no credit left."""


class ModelNotFound(TeacherFault):
    """The endpoint does not know the model."""


class Stopped(SelfInstructError):
    """The run ended before its target and can be resumed: a limit, a saturated pool, an outage."""

    exit_code = 4


class TransientFault(SelfInstructError):
    """The attempt failed and may succeed later."""

    exit_code = 4
    retryable = True


class RateLimited(TransientFault):
    """The server asks us to slow down; ``retry_after`` is in seconds, None when it did not say."""

    def __init__(self, message: str, *, retry_after: float | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class UnusableAnswer(TransientFault):
    """The model answered, and the answer is empty. Worth a few repeats, not an endless wait."""


class PromptRefused(SelfInstructError):
    """The endpoint will never answer this prompt (too long, against its policy); skip it and count it."""

    exit_code = 4

    def __init__(self, message: str, *, reason: str = "refused", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.reason = reason


class GivenUp(SelfInstructError):
    """This prompt met nothing but faults while others were answered; skip it, count it, ask it again on resume."""

    exit_code = 4
    retryable = True

    def __init__(self, message: str, *, reason: str, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.reason = reason
