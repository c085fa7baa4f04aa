"""What goes wrong: one exception with a code, the field at fault and one sentence; subclasses where callers branch."""


class Error(Exception):
    """`code` is the name of an mla_status ("busy"; README.md, "Errors"), `field` the argument or the path at fault (""
    where none is), `message` says what is wrong and what to do."""

    def __init__(self, code, field, message):
        super().__init__(f"{code}: {field}: {message}" if field else f"{code}: {message}")
        self.code, self.field, self.message = code, field, message


class InvalidArgument(Error, ValueError):
    """An argument cannot be honoured; nothing was computed."""


class NotConnected(Error, ConnectionError):
    """There is no daemon, and waiting for one took longer than reconnect_ms."""


class Timeout(Error, TimeoutError):
    """The wait ended first; the decode goes on. `pending` is it: wait again, or drop it. Until it has completed its
    inputs must not change and its outputs may still be written; the client keeps their memory alive that long. With
    `field` "stream" nothing was submitted and `pending` is None: a CUDA stream that writes the arrays was not ready."""

    pending = None


class RequestsFailed(Error):
    """Some requests failed, and their rows are unspecified; all others are complete. `result.failures` says which and
    why; `out` and `lse` are the outputs."""

    result = out = lse = None


_CLASSES = {"timeout": Timeout, "requests": RequestsFailed, "not_connected": NotConnected,
            **dict.fromkeys(("invalid", "range", "overlap", "buffer", "unsupported", "batch"), InvalidArgument)}


def raise_status(code, field, message, result=None):
    """Raise the exception that belongs to a code."""
    error = _CLASSES.get(code, Error)(code, field, message)
    if isinstance(error, RequestsFailed):
        error.result = result
    raise error


def invalid(field, message):
    """The exception for an argument that this package refuses itself."""
    return InvalidArgument("invalid", field, message)


def unsupported(field, message):
    """The exception for an argument of another library's interface that mlad does not honour."""
    return InvalidArgument("unsupported", field, message)
