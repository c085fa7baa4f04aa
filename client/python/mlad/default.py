"""The clients that the drop-in modules use: one for each device of this process, connected when first needed."""
import sys
import threading

from . import arrays
from .client import Client
from .errors import unsupported

_clients, _lock = {}, threading.Lock()


def default_client(device=None):
    """The client of a CUDA device (its ordinal here), or with None of the device that $MLAD_DEVICE or the daemon
    chooses.

    Connected at the first call to $MLAD_SOCKET. For cuda:N the daemon's device is that GPU's, "GPU-<uuid>"."""
    with _lock:
        if device not in _clients:
            _clients[device] = Client(device=None if device is None else _gpu(device))
        return _clients[device]


def set_default_client(client, device=None):
    """Have default_client(device) return `client` (None: connect again when needed); returns the one it replaces, which
    stays open and is the caller's to close."""
    with _lock:
        before = _clients.pop(device, None)
        if client is not None:
            _clients[device] = client
        return before


def client_for(tensor):
    """The default client of the device that a torch tensor is on."""
    if arrays.torch_of(tensor) is None:
        raise unsupported("q", f"it must be a torch tensor, not {type(tensor).__name__}")
    return default_client(tensor.device.index if tensor.device.type == "cuda" else None)


def _gpu(ordinal):
    uuid = getattr(sys.modules["torch"].cuda.get_device_properties(ordinal), "uuid", None)
    if uuid is None:
        raise unsupported("device", "this torch does not tell a GPU's UUID (2.5 does); name the client with "
                          "mlad.set_default_client(mlad.Client(device='GPU-...'), ordinal)")
    return f"GPU-{uuid}"
