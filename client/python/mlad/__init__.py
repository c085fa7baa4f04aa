"""mlad: multi-head latent attention decodes in a daemon, on memory shared with it.

    import mlad
    with mlad.Client() as client:
        q = client.empty((2, 4, 16, 576), mlad.bfloat16)            # likewise kv, block_table, seqlens; fill them
        out, lse = client.decode(q, kv, block_table, seqlens, softmax_scale=192**-0.5)

Client.decode documents shapes and types; kernels/CONTRACT.md says what a decode means. torch is optional.
"""
from ._libmla import library as _library
from .arrays import bfloat16, float8_e4m3
from .client import Client, Failure, Pending, Plan, Result
from .default import default_client, set_default_client
from .errors import Error, InvalidArgument, NotConnected, RequestsFailed, Timeout

__version__ = "0.1.0"
__all__ = ["Client", "Error", "Failure", "InvalidArgument", "NotConnected", "Pending", "Plan", "RequestsFailed",
           "Result", "Timeout", "bfloat16", "default_client", "float8_e4m3", "library_version", "set_default_client"]


def library_version():
    """The version of the libmla that is loaded, such as "0.1.0"."""
    return _library().mla_version().decode()
