"""The former name of ``titan_attent.score pair``; it ends with one error that says so."""

from titan_attent.titan.user_errors import fail

if __name__ == "__main__":
    fail(ValueError("titan_attent.scorers is `titan_attent.score pair` now: use that, with the same options"))
