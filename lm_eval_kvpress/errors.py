"""The base class of all errors in what a user gave: arguments, files, requests.

Every package raises it or derives from it, so that a command can end on such an error in one line and show a traceback
for everything else. Imports nothing: a task may raise it without loading torch or kvpress.
"""


class UsageError(ValueError):
    """Bad input. The text is one line that says what is wrong and what to do next."""
