"""The one exception for what a user can mend: a bad field, file or model."""


class UserError(ValueError):
    """One clear sentence that names the field, the value and what would do. The command line exits with 2 on it."""
