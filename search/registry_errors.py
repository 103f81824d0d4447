"""What went wrong at a registry, in one line: MLflow's own texts are long and of its insides."""

import re

from requests import RequestException
from sqlalchemy.exc import DBAPIError

LONGEST = 300
ADDRESSES = "http://HOST:PORT of an MLflow server, or a database such as sqlite:///FILE"
IDENTITY = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"


def reason(error: Exception) -> str:
    """What ``error`` says and what to do about it; secrets are still in it."""
    return _reason(error, str(error))[:LONGEST]


def _reason(error: Exception, text: str) -> str:
    code = getattr(error, "error_code", None)  # of an MlflowException
    if isinstance(error, ImportError):
        return f"this kind of address needs the Python package {error.name}, which is not installed"
    if isinstance(error, DBAPIError):
        return f"the database says: {_line(str(error.orig))}"
    if "unsupported URI" in text or "filesystem tracking backend" in text:
        return f"there is no registry at such an address; give {ADDRESSES}"
    if isinstance(error.__context__, RequestException):
        if found := re.search(r"too many (\d+) error responses", text):
            return f"the server answers HTTP {found[1]}; look into its log, try again later"
        found = re.search(r"\[Errno -?\d+\] ([\w ]+)", text)
        why = found[1].lower() if found else type(error.__context__).__name__
        return f"nothing answers there ({why}): is the server up, the address right?"
    body = _line(text.partition("Response body: ")[2] or text).strip("'")
    if "Invalid Host header" in text:
        return f"the server does not go by this name; start it with --allowed-hosts ({body})"
    if code == "UNAUTHENTICATED":
        return f"the server does not know who asks; {IDENTITY}"
    if code == "PERMISSION_DENIED":
        return f"you may not do this there ({body}); ask for the permission, or {IDENTITY}"
    if code == "ENDPOINT_NOT_FOUND" or "not in a valid JSON format" in text:
        return f"what answers there is no MLflow server; give {ADDRESSES}"
    return body


def _line(text: str) -> str:
    return " ".join(text.split())
