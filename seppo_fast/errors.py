"""The one exception whose message is written for the person who runs the program."""


class UserError(Exception):
    """Bad input: names the file, row or key and says what to do. Printed without a traceback, exit status 2."""
