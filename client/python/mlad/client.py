"""A connection to one device of a daemon, its plans, and decodes in flight."""
import collections
import ctypes
import os
import threading
import time
from typing import NamedTuple, Tuple

import numpy as np

from . import _libmla, arrays, cuda
from .batch import describe
from .errors import Error, InvalidArgument, Timeout, invalid, unsupported
from .memory import Memory

PLANS = 256             # kept by Client.decode; the daemon allows each user 4096 by default


class Failure(NamedTuple):
    """One request that failed."""
    request: int            # its index in the batch
    field: str              # such as "block_table[3][7]"
    message: str


class Result(NamedTuple):
    """What came of a decode."""
    failed: int                     # requests that failed
    failures: Tuple[Failure, ...]   # the first 32 of them
    kv_tokens: int                  # KV tokens of the batch
    receive_ns: int                 # in the daemon: to queued,
    queue_ns: int                   # to launched,
    kernel_ns: int                  # to complete
    replays: int                    # times it was submitted again after a death of the daemon


def _result(raw):
    failures = tuple(Failure(f.request, f.field.decode(errors="replace"), f.message.decode(errors="replace"))
                     for f in raw.failures[:raw.listed])
    return Result(raw.failed, failures, raw.kv_tokens, raw.receive_ns, raw.queue_ns, raw.kernel_ns, raw.replays)


def _deadline(timeout):
    return None if timeout is None else time.monotonic() + timeout


class Pending:
    """A decode in flight. It keeps the arrays of the decode alive; dropping it uncollected leaves them to the client
    until the decode has completed. To be used by one thread at a time."""

    def __init__(self, client, ticket, keep, out, lse):
        self._client, self._ticket, self._keep = client, ticket, keep
        self.out, self.lse = out, lse
        self._outcome = None        # a Result or an Error, once collected

    def done(self):
        """Has it completed? Never blocks. wait() then returns, or raises, at once."""
        if self._outcome is None:
            self._collect("mla_poll", 0)
        return self._outcome is not None

    def wait(self, timeout=None):
        """Wait at most `timeout` seconds (None: for ever; 0 only looks) and return the Result. Raises Timeout (wait
        again), or what came of the decode: RequestsFailed, or another Error."""
        return self._wait(timeout, _deadline(timeout))

    def _wait(self, timeout, deadline):
        while self._outcome is None:
            left = cuda.SLICE_MS if deadline is None else int(max(0, deadline - time.monotonic()) * 1000)
            self._collect("mla_wait", min(left, cuda.SLICE_MS))
            if self._outcome is None and deadline is not None and time.monotonic() >= deadline:
                error = Timeout("timeout", "", f"the decode did not complete within {timeout} s; it goes on")
                error.pending = self
                raise error
        if isinstance(self._outcome, Error):
            raise self._outcome
        return self._outcome

    def _collect(self, function, timeout_ms):
        self._client._use()
        raw, error, done = _libmla.mla_result(), _libmla.mla_error(), ctypes.c_int(1)
        library, by = _libmla.library(), ctypes.byref
        if function == "mla_poll":
            status = library.mla_poll(self._client._handle, self._ticket, by(done), by(raw), by(error))
        else:
            status = library.mla_wait(self._client._handle, self._ticket, timeout_ms, by(raw), by(error))
        if not done.value or status == _libmla.TIMEOUT:
            return
        if status == _libmla.OK:
            self._outcome = _result(raw)
        else:
            try:
                _libmla.fail(error, _result(raw))
            except Error as failure:
                self._outcome = failure
                failure.out, failure.lse = self.out, self.lse
        self._keep = None

    def __del__(self):
        if getattr(self, "_outcome", True) is None:
            self._client._orphans.append((self._ticket, self._keep))


class _Closing:
    """What has a close() that gives its `_handle` back: at the end of a `with`, or when it is collected."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __del__(self):
        if getattr(self, "_handle", None) is not None:
            self.close()


class Plan(_Closing):
    """One batch, validated once, for an engine's every step. Its arrays stay alive with it; their contents may change
    between submissions. `out` and `lse` are written by each decode."""

    def __init__(self, client, description, handle):
        self._client, self._handle = client, handle
        self._views, self._keep, self._segments = description.views, description.keep, description.segments
        self.out, self.lse = description.out, description.lse

    def submit(self, timeout=None):
        """Start a decode and return it as Pending. GPU streams that write the arrays are waited for first, at most
        `timeout` seconds (None: for ever). The contents of the inputs must not change until it has completed."""
        return self._submit(_deadline(timeout))

    def _submit(self, deadline):
        client = self._client
        for device in {seen.device for seen in self._views if seen.kind == "torch" and seen.device is not None}:
            cuda.refuse_capture(device)
        cuda.drain(self._views, deadline)
        with client._lock:
            client._use()
            if self._handle is None:
                raise invalid("plan", "it was closed")
            client._sweep()
            return client._submit(self._handle, self._keep, self.out, self.lse)

    def submit_stream(self, stream=None):
        """Decode in the order of a CUDA stream (a torch stream or a handle; None: torch's current one on the GPU of
        `out`), as mla_submit_stream does: at once, without a wait of the host where the placement allows it, and under
        capture too; then the plan must live as long as its graph. What fails leaves NaN, and status() says why."""
        device = next((seen.device for seen in self._views if seen.kind == "torch" and seen.device is not None), None)
        handle = cuda.current_stream(device) if stream is None else getattr(stream, "cuda_stream", stream)
        with self._client._lock, cuda.guard(device):
            self._client._use()
            if self._handle is None:
                raise invalid("plan", "it was closed")
            _libmla.call("mla_submit_stream", self._handle, handle)

    def status(self):
        """Raise the first error since the last call of decodes by submit_stream(). Never blocks."""
        with self._client._lock:
            self._client._use()
            if self._handle is not None:
                _libmla.call("mla_plan_status", self._handle)

    def decode(self, timeout=None):
        """Submit, wait at most `timeout` seconds (None: for ever), for streams and decode together, and return the
        Result."""
        deadline = _deadline(timeout)
        return self._submit(deadline)._wait(timeout, deadline)

    def close(self):
        """Free the plan. Decodes in flight complete. Otherwise done when it is collected."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._client._closed_plans.append(handle)


class Client(_Closing):
    """A connection to one device. Any thread may use it. After fork() the child must not.

    socket: the daemon's; None: $MLAD_SOCKET, else /run/mlad/mlad.sock. device: "cpu", "GPU-<uuid>", ...; None:
    $MLAD_DEVICE, else the first device served that is not `reference`. name: shown by `mlactl status`. reconnect_ms:
    how long a daemon that is away is waited for, here and at every later call, before NotConnected is raised.
    high_priority: decodes go before those of normal clients that wait; Denied, unless the daemon's high_priority_users
    lists the user."""

    def __init__(self, socket=None, device=None, name=None, reconnect_ms=30000, high_priority=False):
        self._handle, self._pid, self._lock = None, os.getpid(), threading.RLock()
        options, handle = _libmla.mla_options(), ctypes.c_void_p()
        _libmla.library().mla_options_init(ctypes.byref(options))
        options.socket, options.device, options.name = (
            os.fsencode(text) if text is not None else None for text in (socket, device, name))
        options.reconnect_ms, options.high_priority = reconnect_ms, bool(high_priority)
        _libmla.call("mla_connect", ctypes.byref(handle), ctypes.byref(options))
        self._handle = handle
        self._plans = collections.OrderedDict()     # bytes of a batch -> (plan, segments), least recently used first
        self._captured = {}                         # bytes of a batch -> (plan, segments, keep): parts of CUDA graphs
        self._orphans = collections.deque()         # (ticket, keep) of decodes that nobody will collect
        self._closed_plans = collections.deque()
        self._memory = Memory(handle, self._drop_plans)

    @property
    def device(self):
        """The device's name."""
        self._use()
        return _libmla.library().mla_device(self._handle).decode()

    @property
    def placement(self):
        """How this process's GPU work and the worker's meet, and why: ("shared_mps", "own_gpu", "shared_timesliced" or
        "host", a sentence). mlad-placements(7) says what each costs. Known once GPU memory has been registered."""
        self._use()
        why = ctypes.create_string_buffer(256)
        number = _libmla.library().mla_client_placement(self._handle, why)
        return ("shared_mps", "own_gpu", "shared_timesliced", "host")[number], why.value.decode()

    def fileno(self):
        """A descriptor that polls readable when Pending.done() may have news, for an event loop. It belongs to the
        client."""
        self._use()
        descriptor = _libmla.library().mla_fd(self._handle)
        if descriptor < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return descriptor

    def close(self):
        """End the session, once no other thread uses it. Decodes in flight are abandoned; arrays from empty() stay
        valid, as ordinary memory."""
        with self._lock:
            handle, self._handle = self._handle, None
            if handle is not None and self._pid == os.getpid():
                _libmla.library().mla_close(handle)

    # Memory.

    def empty(self, shape, dtype, like="numpy"):
        """An array of host memory that is shared with the daemon; its contents are unspecified.

        dtype: numpy's, torch's, a name ("float32"), mlad.bfloat16 or mlad.float8_e4m3. like: "numpy", or "torch" for a
        CPU tensor. The memory is the array's: it goes back when the last view of it dies, and outlives the client."""
        if like not in ("numpy", "torch"):
            raise invalid("like", f'it must be "numpy" or "torch", not {like!r}')
        name = arrays.dtype_name(dtype)
        shape = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
        if not all(isinstance(n, (int, np.integer)) and n >= 0 for n in shape):
            raise invalid("shape", f"it must hold integers of at least 0, not {shape}")
        size = int(np.prod(shape, dtype=object)) * arrays.ITEM_BYTES[name]
        with self._lock:
            self._use()
            self._sweep()
            return self._memory.lease(size).array(like, name, shape)

    def register(self, array, access=None):
        """Share an array with the daemon now (150 to 200 us on a GPU) instead of at its first use. Of a torch tensor on
        a GPU its whole storage is shared, of a host array, which comes from empty(), its own memory.

        access: None registers it for reading, as inputs are, and anew for both when an output lies in it, which delays
        that decode; "readwrite" does so now; with "read" an output in it is refused. The last word counts.

        It ends when the storage (of other libraries: the object) dies, with forget() or with close(), so a tensor that
        is made anew for each step is registered anew."""
        with self._lock:
            self._use()
            self._sweep()
            self._memory.register(array, arrays.view(array, "array"), "array", access)

    def forget(self, array):
        """End the sharing of a GPU array; the daemon lets go of it as soon as no decode in flight uses it. Memory of
        empty() is let go when its last array dies."""
        with self._lock:
            self._use()
            self._sweep()
            found = self._memory.locate(arrays.view(array, "array"))
            if found is None or found[0].keep is not None:
                raise invalid("array", "it is not registered" if found is None else
                              "it was allocated by the client and is let go when the last array in it dies")
            self._memory.release(found[0])

    # Decodes.

    def decode(self, q, kv, block_table, seqlens, *, softmax_scale, timeout=None, **options):
        """Decode once and wait: returns (out, lse), or out alone if there is no lse.

        q               [B, q_len, H, 576], or [rows, H, 576] with cu_q; contiguous; bf16, fp16 or fp8 e4m3
        kv              [pages, page_size, 576] or [pages, page_size, 1, 576] of bf16, fp16 or fp8 e4m3, or uint8 or
                        fp8 [.., 656]: 512 e4m3, 4 fp32 scales, 64 bf16. Pages and rows may be strided, by multiples of
                        16 bytes
        block_table     int32 [B, max_pages]
        seqlens         int32 [B], the new tokens included; with dcp the global lengths
        softmax_scale   required
        out             [.., H, 512], rows as q has them; None: a new array of q's kind, of q's type (bf16 for fp8 q)
        lse             fp32 [.., H]; None: a new array, unless return_lse=False
        mask            "causal", "none", or a tree mask: uint64 (or int64 of the same bits) [rows] or [B, q_len]
        cu_q            int32 [B + 1]: the first row of each request and the end, for ragged q_len 0..64
        window          keys, 0: none
        sink            fp32 [H]
        q_scale, k_scale, v_scale   numbers, or arrays of one fp32
        dcp             (world, rank, interleave); None: (1, 0, 1)
        lse_base        "e" or "2"
        deterministic   a request's bits do not depend on its batch-mates
        timeout         seconds, for CUDA streams and the decode together; None: for ever

        Arrays: numpy or CPU torch memory from empty(); CUDA torch tensors and objects with __cuda_array_interface__
        (registered at their first use, for reading unless they are written) if the device is their GPU. Host memory of
        q, kv, out and lse that is not shared is refused. The metadata (block_table, seqlens, cu_q, mask, sink, scales)
        may lie anywhere: where it is not shared it is copied, for this decode, into host memory that is. For CUDA
        arrays the work of the current stream is waited for first.

        Raises RequestsFailed if some requests failed, Timeout, InvalidArgument, NotConnected or another Error."""
        deadline = _deadline(timeout)
        pending = self._start(deadline, q, kv, block_table, seqlens, softmax_scale=softmax_scale, **options)
        pending._wait(timeout, deadline)
        return pending.out if pending.lse is None else (pending.out, pending.lse)

    def submit(self, q, kv, block_table, seqlens, *, softmax_scale, timeout=None, **options):
        """Start the decode that decode() describes and return it as Pending, with `out` and `lse`. CUDA streams are
        waited for at most `timeout` seconds."""
        return self._start(_deadline(timeout), q, kv, block_table, seqlens, softmax_scale=softmax_scale, **options)

    def decode_in_order(self, q, kv, block_table, seqlens, *, softmax_scale, **options):
        """As decode(), in the order of torch's current stream on q's GPU where the placement allows it (order()): the
        host does not wait, later work on the stream sees the results, and it may be captured into a CUDA graph, which
        then keeps its arrays until close(). All arrays must be CUDA tensors or shared. A decode whose arrays are new to
        the client is waited for, unless it is captured; otherwise as decode().

        What fails leaves NaN in its rows of out and lse, and is raised by the next decode of the same arrays."""
        call = (q, kv, block_table, seqlens), {"softmax_scale": softmax_scale, **options}
        seen = arrays.view(q, "q")
        device = seen.device if seen.kind == "torch" else None
        if device is None:
            return self.decode(*call[0], **call[1])
        with self._lock, cuda.guard(device):
            captured = cuda.capturing(device)
            order, why = self.order()
            if order != "stream":
                if captured:
                    raise unsupported("stream", f"cuda:{device} is being captured, which needs stream order: {why}")
                return self.decode(*call[0], **call[1])
            if not captured:
                self._sweep()
            try:
                d = describe(self._memory, False, *call[0], in_order=True, **call[1])
            except InvalidArgument:
                if captured:
                    raise
                return self.decode(*call[0], **call[1])
            self._run_in_order(d, cuda.current_stream(device), captured)
        return d.out if d.lse is None else (d.out, d.lse)

    def order(self):
        """("stream" or "host", why): how decodes of CUDA tensors wait for the work around them, with the GPU that is
        current."""
        self._use()
        why = ctypes.create_string_buffer(_libmla.WHY)
        order = _libmla.library().mla_client_order(self._handle, why)
        return "stream" if order == _libmla.ORDER_STREAM else "host", why.value.decode(errors="replace")

    def _run_in_order(self, d, stream, captured):
        entry = self._captured.get(d.key) or self._plans.pop(d.key, None)
        known = entry is not None
        if not known:
            entry = self._create(d.batch), d.segments
        if captured and d.key not in self._captured:
            self._captured[d.key] = (*entry[:2], d.keep)
        elif d.key not in self._captured:
            self._plans[d.key] = entry[:2]
            self._trim()
        if captured or known:
            _libmla.call("mla_plan_status", entry[0])
            _libmla.call("mla_submit_stream", entry[0], stream)
        else:
            cuda.drain(d.views)
            self._submit(entry[0], d.keep, d.out, d.lse).wait()

    def plan(self, q, kv, block_table, seqlens, *, softmax_scale, **options):
        """Validate the decode that decode() describes, once, for many submissions of the same arrays with new contents.
        All of them must be shared, the metadata too."""
        with self._lock:
            self._use()
            self._sweep()
            d = self._describe(False, q, kv, block_table, seqlens, softmax_scale=softmax_scale, **options)
            return Plan(self, d, self._create(d.batch))

    def _describe(self, *arguments, **options):
        d = describe(self._memory, *arguments, **options)
        return d if d.holds() else describe(self._memory, *arguments, **options)

    def _start(self, deadline, *arguments, **options):
        while True:
            with self._lock:
                self._use()
                self._sweep()
                d = self._describe(True, *arguments, **options)
            cuda.drain(d.views, deadline)       # other threads go on meanwhile, and may change what is registered
            with self._lock:
                self._use()
                if d.holds():
                    return self._launch(d)

    def _launch(self, d):
        d.copy()
        entry = self._plans.pop(d.key, None) or (self._create(d.batch), d.segments)
        self._plans[d.key] = entry
        self._trim()
        return self._submit(entry[0], d.keep, d.out, d.lse)

    def _trim(self):
        while len(self._plans) > PLANS:
            _, (plan, _) = self._plans.popitem(last=False)
            _libmla.library().mla_plan_destroy(plan)

    def _create(self, batch):
        plan = ctypes.c_void_p()
        _libmla.call("mla_plan_create", self._handle, ctypes.byref(batch), ctypes.byref(plan))
        return plan

    def _submit(self, plan, keep, out, lse):
        ticket = ctypes.c_uint64()
        _libmla.call("mla_submit", self._handle, plan, ctypes.byref(ticket))
        return Pending(self, ticket.value, keep, out, lse)

    # Upkeep.

    def _use(self):
        if self._handle is None:
            raise invalid("client", "it was closed")
        if self._pid != os.getpid():
            raise invalid("client", "it belongs to the parent process; connect again after fork()")

    def _sweep(self):
        """Finish what the garbage collector may only note down. Locked."""
        while self._closed_plans:
            _libmla.library().mla_plan_destroy(self._closed_plans.popleft())
        for _ in range(len(self._orphans)):
            ticket, keep = self._orphans.popleft()
            done = ctypes.c_int(1)
            _libmla.library().mla_poll(self._handle, ticket, ctypes.byref(done), None, None)
            if not done.value:
                self._orphans.append((ticket, keep))
        self._memory.sweep()

    def _drop_plans(self, segment):
        for key in [key for key, (_, segments) in self._plans.items() if segment in segments]:
            _libmla.library().mla_plan_destroy(self._plans.pop(key)[0])
