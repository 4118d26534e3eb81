"""The exceptions that the command line turns into a sentence."""


class UserError(ValueError):
    """What a user can mend: a bad field, file or model, and what would do. Exit code 2."""


class EngineError(RuntimeError):
    """A rollout engine died, hangs, or gives what cannot be trained on. Exit code 1; the last checkpoint is good."""
