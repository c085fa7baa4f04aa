/* mlap_messages.h - every message of the protocol, described once.
 *
 * Each message is one X-macro list of fields. From that list come the C struct
 * (below), the codec's tables (mlap_tables.c), the bounds that a decoder enforces
 * and the message pages of PROTOCOL.md (printed by mlap-reference). Nothing else
 * in the tree describes a field a second time.
 *
 * A field is  F(message, KIND, name, sub, min, max, NEED, "documentation").
 *   KIND  BOOL | U32 | U64 | F64  numbers, min..max inclusive (F64: finite)
 *         STR   text of min..max bytes, valid UTF-8, no NUL, kept NUL-terminated
 *         ENUM  text on the wire, an enumerator of mlap_<sub> in C
 *         MSG   a nested map described by message <sub>
 *         LIST  an array of 0..max nested maps described by message <sub>
 *   NEED  REQ  must be there
 *         OPT  may be absent; then the member is zero and mlap_has() is false
 * A message has at most 64 fields. */
#ifndef MLAP_MESSAGES_H
#define MLAP_MESSAGES_H

#include <stdbool.h>
#include <stdint.h>

#define MLAP_VERSION 1u            /* the protocol version in each header */
#define MLAP_MAX_MESSAGE 65536u    /* bytes in one datagram, header included */
#define MLAP_MAX_FDS 252u          /* file descriptors in one datagram: Linux carries one more, so that more is told */
#define MLAP_FEATURE_RINGS 1u      /* in HELLO's and WELCOME's features */
#define MLAP_MAX_DEVICES 16
#define MLAP_MAX_CAPABILITIES 64
#define MLAP_MAX_SESSIONS_LISTED 64
#define MLAP_MAX_FAILURES_LISTED 32
#define MLAP_MAX_PHASES 6
#define MLAP_MAX_LAYERS 256
#define MLAP_I64_MAX INT64_MAX
#define MLAP_U32_MAX UINT32_MAX

/* ---- enumerations: E(enumeration, ENUMERATOR, "wire text", "documentation") ---- */

#define MLAP_ENUM_code(E, M) \
    E(M, OK, "ok", "no error") \
    E(M, VERSION, "version", "the header's protocol version is not spoken here; the session is closed") \
    E(M, MALFORMED, "malformed", "the datagram is no message of this protocol; the session is closed") \
    E(M, UNKNOWN_TYPE, "unknown_type", "no message of that type may be sent here") \
    E(M, UNKNOWN_FIELD, "unknown_field", "the body holds a field that the message does not have") \
    E(M, MISSING_FIELD, "missing_field", "a required field is absent") \
    E(M, INVALID, "invalid", "a field's type or value is out of bounds") \
    E(M, FDS, "fds", "too few or too many file descriptors came with the message") \
    E(M, STATE, "state", "the message is not allowed in the session's present state") \
    E(M, DENIED, "denied", "the peer's user or group may not do this") \
    E(M, NO_DEVICE, "no_device", "no device of that name is served here") \
    E(M, UNAVAILABLE, "unavailable", "the device is starting or restarting; try again") \
    E(M, DRAINING, "draining", "the device takes no new work until an operator resumes it") \
    E(M, EVICTED, "evicted", "an operator ended the session") \
    E(M, QUOTA, "quota", "a limit of the user would be exceeded") \
    E(M, BUSY, "busy", "the queue is full; nothing was queued; try again after a completion") \
    E(M, MEMORY, "memory", "the daemon could not get the memory it needs") \
    E(M, BUFFER, "buffer", "the file descriptor cannot be used as a buffer") \
    E(M, EXISTS, "exists", "the id is taken") \
    E(M, NOT_FOUND, "not_found", "no such id in this session") \
    E(M, IN_USE, "in_use", "something that still exists names it") \
    E(M, RANGE, "range", "a tensor does not lie inside its buffer") \
    E(M, OVERLAP, "overlap", "an output overlaps an input or the other output") \
    E(M, UNSUPPORTED, "unsupported", \
      "no kernel of this device honours that combination; the message cites the capability table") \
    E(M, BATCH, "batch", "the lengths or tables of the whole batch are inconsistent") \
    E(M, REQUESTS, "requests", "some requests of the batch failed, the others completed") \
    E(M, TIMEOUT, "timeout", "the peer or the device did not answer in time") \
    E(M, DEVICE_LOST, "device_lost", "the device failed and took the work with it") \
    E(M, WORKER_LOST, "worker_lost", "the worker died repeatedly with this work in flight") \
    E(M, NOT_CONNECTED, "not_connected", "the daemon cannot be reached") \
    E(M, INTERNAL, "internal", "a fault of the daemon; its log says more")

#define MLAP_ENUM_dtype(E, M) \
    E(M, BF16, "bf16", "bfloat16") \
    E(M, FP16, "fp16", "IEEE binary16") \
    E(M, E4M3, "fp8_e4m3", "8-bit float, 4 exponent bits, 3 mantissa bits, no infinities")

#define MLAP_ENUM_kv_format(E, M) \
    E(M, BF16, "bf16", "576 bfloat16 a row") \
    E(M, FP16, "fp16", "576 binary16 a row") \
    E(M, E4M3, "fp8_e4m3", "576 e4m3 a row, one scale per tensor") \
    E(M, E4M3_656, "fp8_656", "656 bytes a row: 512 e4m3, 4 fp32 scales (one per 128), 64 bfloat16 rope")

#define MLAP_ENUM_mask(E, M) \
    E(M, NONE, "none", "every key j < K") \
    E(M, CAUSAL, "causal", "query token t sees keys j < K - (q_len-1) + t") \
    E(M, TREE, "tree", "all keys before the drafts, and the drafts that the token's 64-bit mask names")

#define MLAP_ENUM_lse_base(X, M) /* not E: that is an enumerator here */ \
    X(M, E, "e", "natural logarithm") \
    X(M, TWO, "2", "logarithm to base 2")

#define MLAP_ENUM_buffer_kind(E, M) \
    E(M, MEMFD, "memfd", "host memory: a memfd sealed with F_SEAL_SHRINK, sent along")

#define MLAP_ENUM_access(E, M) \
    E(M, READWRITE, "readwrite", "the daemon may write outputs into it") \
    E(M, READ, "read", "the daemon maps it read-only; outputs in it are refused")

#define MLAP_ENUM_device_state(E, M) \
    E(M, STARTING, "starting", "its worker has not reported ready yet") \
    E(M, READY, "ready", "serving") \
    E(M, DRAINING, "draining", "finishing what it has, taking nothing new") \
    E(M, RESTARTING, "restarting", "its worker died and is started again") \
    E(M, ABSENT, "absent", "the device cannot be served on this machine; the reason says why")

#define MLAP_ENUM_priority(E, M) \
    E(M, NORMAL, "normal", "the default") \
    E(M, HIGH, "high", "its decodes go before those of normal sessions; for users that the daemon lists")

#define MLAP_ENUM_health_state(E, M) \
    E(M, OK, "ok", "every device serves") \
    E(M, DEGRADED, "degraded", "some device restarts, drains, has just restarted or does not answer") \
    E(M, FAILED, "failed", "no device serves")

#define MLAP_ENUM_phase(E, M) \
    E(M, RECEIVE, "receive", "datagram read to work queued: decode, validate") \
    E(M, QUEUE, "queue", "queued to launched") \
    E(M, KERNEL, "kernel", "launched to complete") \
    E(M, REPLY, "reply", "complete to completion sent") \
    E(M, GATE, "gate", "stream order, of each layer, by the GPU's clock: the worker is ready for it to its go seen") \
    E(M, SERVE, "serve", "stream order, of each layer, by the GPU's clock: its go seen to its done written")

#define MLAP_ENUM_placement(E, M) \
    E(M, SHARED_MPS, "shared_mps", \
      "client and worker on one GPU, under one MPS server: their kernels run side by side") \
    E(M, OWN_GPU, "own_gpu", "the client has no work on the worker's GPU: it runs on another one, or on none") \
    E(M, SHARED_TIMESLICED, "shared_timesliced", \
      "client and worker on one GPU, not under one MPS server: they take turns, which costs each call") \
    E(M, HOST, "host", "the device is no GPU")

#define MLAP_ENUM_order(E, M) \
    E(M, HOST, "host", "the client waits for its own work before it submits, and for the decode after") \
    E(M, STREAM, "stream", "the client's stream and the worker's wait for each other on the GPU")

#define MLAP_ENUMS(X) \
    X(code, "Error codes") X(dtype, "Element types of q and out") X(kv_format, "Forms of a KV row") X(mask, "Masks") \
    X(lse_base, "Bases of the log-sum-exp") X(buffer_kind, "Kinds of buffer") X(access, "Access to a buffer") \
    X(device_state, "States of a device") X(priority, "Priorities of a session") X(health_state, "Health") \
    X(phase, "Phases of a decode's latency") \
    X(placement, "Placements of a client") X(order, "Orders of a client's work and its decodes")

/* ---- nested maps ---- */

#define MLAP_FIELDS_tensor(F, M) \
    F(M, U32, buffer, _, 1, MLAP_U32_MAX, REQ, "id of a registered buffer") \
    F(M, U64, offset, _, 0, MLAP_I64_MAX, REQ, "bytes from the start of the buffer to the first element")

#define MLAP_FIELDS_scale(F, M) \
    F(M, F64, value, _, 0, 0, OPT, "the scale itself; either this or tensor") \
    F(M, MSG, tensor, tensor, 0, 0, OPT, "one fp32 in a buffer, read once per launch")

/* A decode's descriptor: what contract.md calls a batch. Required sizes in bytes follow from it. */
#define MLAP_FIELDS_batch(F, M) \
    F(M, U32, batch, _, 1, 65536, REQ, "B, the number of requests") \
    F(M, U32, heads, _, 1, 128, REQ, "H, query heads on this rank") \
    F(M, U64, q_rows, _, 0, 4194304, REQ, \
      "rows of q, out, lse and tree_mask: the sum of all q_len; without cu_q it must be B times one q_len") \
    F(M, ENUM, q_dtype, dtype, 0, 0, REQ, "element type of q") \
    F(M, ENUM, kv_format, kv_format, 0, 0, REQ, "form of a KV row") \
    F(M, ENUM, out_dtype, dtype, 0, 0, OPT, "element type of out; absent: that of q, for fp8 q bf16") \
    F(M, U32, pages, _, 0, 2147483647, REQ, "pages in the KV pool") \
    F(M, U32, page_size, _, 1, 256, REQ, "P, tokens in a page") \
    F(M, U64, page_stride, _, 0, 1099511627776, OPT, \
      "bytes from page to page, a multiple of 16; absent: page_size times row_stride") \
    F(M, U64, row_stride, _, 0, 1048576, OPT, \
      "bytes from row to row in a page, a multiple of 16; absent: the bytes of a row") \
    F(M, U32, max_pages, _, 0, 16777216, REQ, "columns of block_table") \
    F(M, F64, softmax_scale, _, 0, 0, REQ, "factor on every score, sink excepted") \
    F(M, MSG, q, tensor, 0, 0, REQ, "[q_rows, H, 576], 16-byte aligned") \
    F(M, MSG, kv, tensor, 0, 0, REQ, "[pages, P, row], 16-byte aligned") \
    F(M, MSG, block_table, tensor, 0, 0, REQ, "int32 [B, max_pages], 4-byte aligned") \
    F(M, MSG, seqlens, tensor, 0, 0, REQ, "int32 [B], 4-byte aligned; with DCP the global lengths") \
    F(M, MSG, cu_q, tensor, 0, 0, OPT, "int32 [B+1], first row of each request; absent: uniform q_len") \
    F(M, MSG, tree_mask, tensor, 0, 0, OPT, "uint64 [q_rows], 8-byte aligned; exactly with mask = tree") \
    F(M, MSG, sink, tensor, 0, 0, OPT, "fp32 [H], one extra logit a head, natural-log units") \
    F(M, MSG, q_scale, scale, 0, 0, OPT, "scale of an fp8 q; absent: 1") \
    F(M, MSG, k_scale, scale, 0, 0, OPT, "scale of fp8_e4m3 keys; absent: 1") \
    F(M, MSG, v_scale, scale, 0, 0, OPT, "scale of fp8_e4m3 values; absent: k_scale") \
    F(M, MSG, out, tensor, 0, 0, REQ, "[q_rows, H, 512], 16-byte aligned, in a readwrite buffer") \
    F(M, MSG, lse, tensor, 0, 0, OPT, "fp32 [q_rows, H], 4-byte aligned, in a readwrite buffer") \
    F(M, ENUM, mask, mask, 0, 0, OPT, "absent: causal") \
    F(M, ENUM, lse_base, lse_base, 0, 0, OPT, "absent: e") \
    F(M, U32, dcp_world, _, 1, 4096, OPT, "ranks of context parallelism; absent: 1") \
    F(M, U32, dcp_rank, _, 0, 4095, OPT, "this rank, below dcp_world; absent: 0") \
    F(M, U32, dcp_interleave, _, 1, 1048576, OPT, "consecutive keys a rank holds; absent: 1") \
    F(M, U32, window, _, 1, 2147483647, OPT, "sliding window in keys; absent: none") \
    F(M, BOOL, deterministic, _, 0, 0, OPT, "a request's bits do not depend on its batch-mates; absent: false")

#define MLAP_FIELDS_failure(F, M) \
    F(M, U32, request, _, 0, 65535, REQ, "index of the request in its batch") \
    F(M, STR, field, _, 0, 63, REQ, "the field and index at fault, such as block_table[3][7]") \
    F(M, STR, message, _, 0, 255, REQ, "one sentence for a person")

#define MLAP_FIELDS_layer(F, M) \
    F(M, U32, plan, _, 1, MLAP_U32_MAX, REQ, "a plan of the session")

#define MLAP_FIELDS_latency(F, M) \
    F(M, ENUM, phase, phase, 0, 0, REQ, "which phase") \
    F(M, U64, count, _, 0, UINT64_MAX, REQ, "decodes measured; layers, of gate and serve") \
    F(M, U64, sum_ns, _, 0, UINT64_MAX, REQ, "their total, nanoseconds") \
    F(M, U64, p50_ns, _, 0, UINT64_MAX, REQ, "median, nanoseconds") \
    F(M, U64, p90_ns, _, 0, UINT64_MAX, REQ, "90th percentile") \
    F(M, U64, p99_ns, _, 0, UINT64_MAX, REQ, "99th percentile") \
    F(M, U64, max_ns, _, 0, UINT64_MAX, REQ, "largest")

#define MLAP_FIELDS_capability(F, M) \
    F(M, STR, variant, _, 1, 31, REQ, "kernel variant that serves the row") \
    F(M, ENUM, q_dtype, dtype, 0, 0, REQ, "element type of q") \
    F(M, ENUM, kv_format, kv_format, 0, 0, REQ, "form of a KV row") \
    F(M, ENUM, out_dtype, dtype, 0, 0, REQ, "element type of out") \
    F(M, ENUM, mask, mask, 0, 0, REQ, "mask") \
    F(M, U32, max_heads, _, 1, 128, REQ, "largest H") \
    F(M, U32, max_q_len, _, 1, 64, REQ, "largest q_len") \
    F(M, U32, max_page_size, _, 1, 256, REQ, "largest page; all from 1") \
    F(M, STR, features, _, 0, 127, REQ, "space-separated: ragged dcp window sink lse_e lse_2 deterministic strided")

#define MLAP_FIELDS_device(F, M) \
    F(M, STR, name, _, 1, 63, REQ, "cpu, reference, or a GPU's UUID") \
    F(M, ENUM, state, device_state, 0, 0, REQ, "what it is doing") \
    F(M, STR, reason, _, 0, 255, REQ, "why it is in that state; empty when ready") \
    F(M, STR, variant, _, 0, 31, REQ, "kernel variant in use, such as avx512") \
    F(M, U32, threads, _, 0, 65535, REQ, "compute threads") \
    F(M, U32, pid, _, 0, MLAP_U32_MAX, REQ, "process id of the worker, 0 without one") \
    F(M, U32, restarts, _, 0, MLAP_U32_MAX, REQ, "times the worker was started again") \
    F(M, U64, uptime_ms, _, 0, UINT64_MAX, REQ, "since the worker became ready") \
    F(M, BOOL, responding, _, 0, 0, REQ, "the worker answered this query in time; otherwise the figures are its last") \
    F(M, U32, sessions, _, 0, MLAP_U32_MAX, REQ, "open sessions") \
    F(M, U32, sessions_draining, _, 0, MLAP_U32_MAX, REQ, "closed sessions that wait for a launch to end") \
    F(M, U32, buffers, _, 0, MLAP_U32_MAX, REQ, "registered buffers") \
    F(M, U32, plans, _, 0, MLAP_U32_MAX, REQ, "plans") \
    F(M, U64, held_bytes, _, 0, UINT64_MAX, REQ, "bytes mapped for open sessions") \
    F(M, U64, orphaned_bytes, _, 0, UINT64_MAX, REQ, \
      "bytes mapped that belong to no open or draining session; always 0") \
    F(M, U32, queued, _, 0, MLAP_U32_MAX, REQ, "decodes waiting") \
    F(M, U32, running, _, 0, MLAP_U32_MAX, REQ, "decodes running") \
    F(M, U32, queue_limit, _, 0, MLAP_U32_MAX, REQ, "decodes that may wait") \
    F(M, U64, progress, _, 0, UINT64_MAX, REQ, "work items done; grows while anything runs") \
    F(M, U64, decodes, _, 0, UINT64_MAX, REQ, "decodes completed") \
    F(M, U64, decodes_failed, _, 0, UINT64_MAX, REQ, "decodes that ended in an error, wholly or in part") \
    F(M, U64, refused, _, 0, UINT64_MAX, REQ, "messages answered with an error") \
    F(M, U64, busy, _, 0, UINT64_MAX, REQ, "decodes answered with busy") \
    F(M, U64, dropped, _, 0, UINT64_MAX, REQ, "sessions dropped for misbehaviour") \
    F(M, U64, kv_tokens, _, 0, UINT64_MAX, REQ, "KV tokens of completed decodes") \
    F(M, U64, kv_bytes, _, 0, UINT64_MAX, REQ, "KV bytes of completed decodes") \
    F(M, U64, launches, _, 0, UINT64_MAX, REQ, "launches on the device, each of one decode or of several merged") \
    F(M, U64, launched_parts, _, 0, UINT64_MAX, REQ, \
      "decodes, or slices of large ones, in these launches; over launches: the merge factor") \
    F(M, U64, launched_rows, _, 0, UINT64_MAX, REQ, \
      "requests in these launches; over launches: the batch occupancy") \
    F(M, LIST, latency, latency, 0, MLAP_MAX_PHASES, REQ, "one entry a phase") \
    F(M, STR, mps, _, 1, 127, OPT, "the MPS control daemon's pipe directory, as the worker names it; absent: no MPS") \
    F(M, STR, mps_log, _, 1, 127, OPT, "its log directory, where the worker's environment names one")

#define MLAP_FIELDS_session(F, M) \
    F(M, U64, session, _, 1, UINT64_MAX, REQ, "id, for evict") \
    F(M, U32, uid, _, 0, MLAP_U32_MAX, REQ, "the peer's user") \
    F(M, U32, pid, _, 0, MLAP_U32_MAX, REQ, "the peer's process, 0 if outside our pid namespace") \
    F(M, STR, client, _, 0, 63, REQ, "the name it gave in HELLO") \
    F(M, U64, age_ms, _, 0, UINT64_MAX, REQ, "since HELLO") \
    F(M, BOOL, draining, _, 0, 0, REQ, "the peer has gone; a launch still names its memory") \
    F(M, U32, buffers, _, 0, MLAP_U32_MAX, REQ, "registered buffers") \
    F(M, U64, bytes, _, 0, UINT64_MAX, REQ, "bytes mapped") \
    F(M, U32, plans, _, 0, MLAP_U32_MAX, REQ, "plans") \
    F(M, U32, in_flight, _, 0, MLAP_U32_MAX, REQ, "decodes queued or running") \
    F(M, U64, decodes, _, 0, UINT64_MAX, REQ, "decodes completed") \
    F(M, U64, kv_tokens, _, 0, UINT64_MAX, REQ, "KV tokens of completed decodes") \
    F(M, BOOL, rings, _, 0, 0, REQ, "it has rings; false: all goes over the socket") \
    F(M, ENUM, placement, placement, 0, 0, REQ, "how its GPU work and the worker's meet") \
    F(M, ENUM, order, order, 0, 0, REQ, "how its work and its decodes wait for each other") \
    F(M, STR, why, _, 0, 255, REQ, "why that placement, in one sentence")

/* ---- messages of the public protocol ---- */

#define MLAP_FIELDS_hello(F, M) \
    F(M, STR, client, _, 1, 63, REQ, "name of the connecting program, for status and logs") \
    F(M, STR, device, _, 1, 63, OPT, \
      "device to work on; absent: a session with the supervisor, for status and administration") \
    F(M, U64, features, _, 0, UINT64_MAX, OPT, "bit set of optional features wanted; 1: rings") \
    F(M, ENUM, priority, priority, 0, 0, OPT, "absent: normal") \
    F(M, STR, gpu, _, 1, 63, OPT, \
      "UUID of the GPU on which the client works; absent: none so far, or it is not known") \
    F(M, STR, mps, _, 1, 127, OPT, \
      "pipe directory of the MPS control daemon that serves, or would serve, the client; absent: none")

#define MLAP_FIELDS_welcome(F, M) \
    F(M, STR, daemon, _, 1, 63, REQ, "name and version of the daemon") \
    F(M, U64, session, _, 1, UINT64_MAX, REQ, "this session's id") \
    F(M, STR, device, _, 0, 63, REQ, "the device, empty for the supervisor") \
    F(M, U64, features, _, 0, UINT64_MAX, REQ, "bit set of features granted") \
    F(M, U32, max_message, _, 1, MLAP_U32_MAX, REQ, "largest datagram in bytes, header included") \
    F(M, U32, max_buffers, _, 0, MLAP_U32_MAX, REQ, "buffers a user may register on this device") \
    F(M, U64, max_bytes, _, 0, UINT64_MAX, REQ, \
      "bytes this session may register: the lower of its own limit and its user's on this device") \
    F(M, U32, max_plans, _, 0, MLAP_U32_MAX, REQ, "plans a user may hold on this device") \
    F(M, U32, max_in_flight, _, 0, MLAP_U32_MAX, REQ, \
      "decodes this session may have queued or running: the lower of its own limit and its user's on this device") \
    F(M, STR, mps, _, 1, 127, OPT, "pipe directory of the MPS control daemon that serves the worker; absent: none")

#define MLAP_FIELDS_ok(F, M)

#define MLAP_FIELDS_ring_memory(F, M) \
    F(M, U32, entries, _, 1, 4096, REQ, "entries in each ring, a power of two; the memfd's size follows from it")

#define MLAP_FIELDS_knock(F, M)

#define MLAP_FIELDS_news(F, M)

#define MLAP_FIELDS_error(F, M) \
    F(M, ENUM, code, code, 0, 0, REQ, "what kind of error; stable") \
    F(M, STR, field, _, 0, 63, REQ, "path of the field at fault, empty where none is") \
    F(M, STR, message, _, 0, 511, REQ, "one sentence for a person: what is wrong and what to do")

#define MLAP_FIELDS_register(F, M) \
    F(M, U32, buffer, _, 1, MLAP_U32_MAX, REQ, "id chosen by the client, unique in its session") \
    F(M, ENUM, kind, buffer_kind, 0, 0, REQ, "what the file descriptor is") \
    F(M, U64, offset, _, 0, MLAP_I64_MAX, OPT, \
      "bytes from the start of the memfd, a multiple of the page size; absent: 0") \
    F(M, U64, bytes, _, 1, MLAP_I64_MAX, REQ, "length; offset + bytes may not pass the memfd's end") \
    F(M, ENUM, access, access, 0, 0, OPT, "absent: readwrite")

#define MLAP_FIELDS_import(F, M) \
    F(M, U32, buffer, _, 1, MLAP_U32_MAX, REQ, \
      "id chosen by the client, unique in its session and with those of REGISTER") \
    F(M, STR, handle, _, 128, 128, REQ, \
      "the legacy CUDA IPC handle of the whole allocation, 64 bytes in hexadecimal; whoever has it can map the " \
      "memory") \
    F(M, STR, gpu, _, 1, 63, REQ, \
      "UUID of the GPU on which the memory lies, such as GPU-01234567-89ab-cdef-0123-456789abcdef") \
    F(M, U64, offset, _, 0, MLAP_I64_MAX, REQ, "bytes from the start of the allocation to the buffer") \
    F(M, U64, bytes, _, 1, MLAP_I64_MAX, REQ, "length; offset + bytes may not pass the allocation's end") \
    F(M, ENUM, access, access, 0, 0, OPT, "absent: readwrite")

/* File descriptors do not tell whether two of them are one allocation: `address` does, within a process. */
#define MLAP_FIELDS_import_vmm(F, M) \
    F(M, U32, buffer, _, 1, MLAP_U32_MAX, REQ, \
      "id chosen by the client, unique in its session and with those of REGISTER") \
    F(M, STR, gpu, _, 1, 63, REQ, \
      "UUID of the GPU on which the memory lies, such as GPU-01234567-89ab-cdef-0123-456789abcdef") \
    F(M, U64, allocation, _, 1, 281474976710656, REQ, \
      "bytes of each allocation (cuMemCreate); all have one size, and lie end to end in the order of their " \
      "descriptors") \
    F(M, U64, offset, _, 0, 281474976710655, REQ, \
      "bytes from the start of the first allocation to the buffer, less than allocation") \
    F(M, U64, bytes, _, 1, MLAP_I64_MAX, REQ, \
      "length; there are as many descriptors as offset + bytes needs allocations, neither fewer nor more") \
    F(M, U64, address, _, 0, MLAP_I64_MAX, REQ, \
      "where the client has it mapped; only compared: buffers of this message overlap where their addresses do") \
    F(M, ENUM, access, access, 0, 0, OPT, "absent: readwrite")

#define MLAP_FIELDS_unregister(F, M) \
    F(M, U32, buffer, _, 1, MLAP_U32_MAX, REQ, "a registered buffer; answered when it is unmapped")

#define MLAP_FIELDS_plan(F, M) \
    F(M, U32, plan, _, 1, MLAP_U32_MAX, REQ, "id chosen by the client, unique in its session") \
    F(M, MSG, batch, batch, 0, 0, REQ, "the descriptor")

#define MLAP_FIELDS_drop(F, M) \
    F(M, U32, plan, _, 1, MLAP_U32_MAX, REQ, "a plan; its decodes in flight complete")

#define MLAP_FIELDS_decode(F, M) \
    F(M, MSG, batch, batch, 0, 0, REQ, "the descriptor, used once")

#define MLAP_FIELDS_submit(F, M) \
    F(M, U32, plan, _, 1, MLAP_U32_MAX, REQ, "the plan to run with what its buffers now hold")

#define MLAP_FIELDS_step(F, M) \
    F(M, U32, step, _, 1, MLAP_U32_MAX, REQ, "id chosen by the client, unique in its session") \
    F(M, MSG, slots, tensor, 0, 0, REQ, \
      "128 bytes a layer, 128-byte aligned, in a readwrite buffer of GPU memory: the flags, see Stream order") \
    F(M, LIST, layers, layer, 0, MLAP_MAX_LAYERS, REQ, "what runs, in order; one at least")

#define MLAP_FIELDS_step_drop(F, M) \
    F(M, U32, step, _, 1, MLAP_U32_MAX, REQ, "a step; its rounds in flight complete")

#define MLAP_FIELDS_arm(F, M) \
    F(M, U32, step, _, 1, MLAP_U32_MAX, REQ, "the step to run once its flags say so") \
    F(M, U32, round, _, 0, MLAP_U32_MAX, REQ, "which round of its flags")

#define MLAP_FIELDS_done(F, M) \
    F(M, U64, receive_ns, _, 0, UINT64_MAX, REQ, "datagram read to queued") \
    F(M, U64, queue_ns, _, 0, UINT64_MAX, REQ, "queued to launched") \
    F(M, U64, kernel_ns, _, 0, UINT64_MAX, REQ, "launched to complete") \
    F(M, U64, kv_tokens, _, 0, UINT64_MAX, REQ, "KV tokens that the batch holds") \
    F(M, U32, failed, _, 0, 65536, REQ, "requests that failed; the rows of the others are complete") \
    F(M, LIST, failures, failure, 0, MLAP_MAX_FAILURES_LISTED, REQ, "the first of them, in order")

#define MLAP_FIELDS_status(F, M)

#define MLAP_FIELDS_status_reply(F, M) \
    F(M, STR, daemon, _, 1, 63, REQ, "name and version of the daemon") \
    F(M, U32, pid, _, 0, MLAP_U32_MAX, REQ, "process id of the supervisor") \
    F(M, U64, uptime_ms, _, 0, UINT64_MAX, REQ, "since the supervisor started") \
    F(M, U32, connections, _, 0, MLAP_U32_MAX, REQ, "connections that the supervisor itself holds") \
    F(M, U64, denied, _, 0, UINT64_MAX, REQ, "connections refused by policy") \
    F(M, LIST, devices, device, 0, MLAP_MAX_DEVICES, REQ, "every configured device") \
    F(M, STR, note, _, 1, 255, OPT, \
      "what an operator should know of the devices, such as why devices = all found no GPU")

#define MLAP_FIELDS_capabilities(F, M) \
    F(M, STR, device, _, 1, 63, REQ, "a device")

#define MLAP_FIELDS_capabilities_reply(F, M) \
    F(M, STR, device, _, 1, 63, REQ, "the device") \
    F(M, LIST, rows, capability, 0, MLAP_MAX_CAPABILITIES, REQ, "what runs on it")

#define MLAP_FIELDS_sessions(F, M) \
    F(M, STR, device, _, 1, 63, REQ, "a device") \
    F(M, U64, after, _, 0, UINT64_MAX, OPT, "list sessions with a larger id; absent: 0")

#define MLAP_FIELDS_sessions_reply(F, M) \
    F(M, STR, device, _, 1, 63, REQ, "the device") \
    F(M, LIST, sessions, session, 0, MLAP_MAX_SESSIONS_LISTED, REQ, \
      "by ascending id; others' sessions are listed to admin users only") \
    F(M, BOOL, more, _, 0, 0, REQ, "ask again, after the last id, for the rest")

#define MLAP_FIELDS_health(F, M)

#define MLAP_FIELDS_health_reply(F, M) \
    F(M, ENUM, health, health_state, 0, 0, REQ, "the daemon's own judgement") \
    F(M, STR, reason, _, 0, 511, REQ, "one sentence; empty when ok")

#define MLAP_FIELDS_drain(F, M) \
    F(M, STR, device, _, 1, 63, REQ, "a device") \
    F(M, BOOL, resume, _, 0, 0, OPT, "true ends the drain")

#define MLAP_FIELDS_evict(F, M) \
    F(M, STR, device, _, 1, 63, REQ, "a device") \
    F(M, U64, session, _, 1, UINT64_MAX, REQ, "the session to end")

/* ---- messages between the supervisor and its workers; never accepted from a client ---- */

#define MLAP_FIELDS_configure(F, M) \
    F(M, U32, max_sessions, _, 0, MLAP_U32_MAX, REQ, "sessions a user may have") \
    F(M, U64, max_bytes, _, 0, UINT64_MAX, REQ, "bytes a user may register") \
    F(M, U32, max_buffers, _, 0, MLAP_U32_MAX, REQ, "buffers a user may register") \
    F(M, U32, max_plans, _, 0, MLAP_U32_MAX, REQ, "plans a user may hold") \
    F(M, U32, max_in_flight, _, 0, MLAP_U32_MAX, REQ, "decodes a user may have queued or running") \
    F(M, U64, max_bytes_per_session, _, 0, UINT64_MAX, REQ, "bytes a session may register") \
    F(M, U32, max_in_flight_per_session, _, 0, MLAP_U32_MAX, REQ, "decodes a session may have queued or running") \
    F(M, U32, queue_limit, _, 0, MLAP_U32_MAX, REQ, "decodes that may wait on the device") \
    F(M, U32, log_level, _, 0, 7, REQ, "syslog priority") \
    F(M, BOOL, draining, _, 0, 0, REQ, "take no new work") \
    F(M, BOOL, stopping, _, 0, 0, OPT, "read nothing more from clients: the daemon ends, the next one will answer them")

#define MLAP_FIELDS_attach(F, M) \
    F(M, U64, session, _, 1, UINT64_MAX, REQ, "id the supervisor chose") \
    F(M, U32, uid, _, 0, MLAP_U32_MAX, REQ, "SO_PEERCRED") \
    F(M, U32, pid, _, 0, MLAP_U32_MAX, REQ, "SO_PEERCRED") \
    F(M, U32, hello_seq, _, 0, MLAP_U32_MAX, REQ, "sequence of the HELLO to answer") \
    F(M, MSG, hello, hello, 0, 0, REQ, "the HELLO")

#define MLAP_FIELDS_ready(F, M) \
    F(M, STR, variant, _, 0, 31, REQ, "kernel variant in use") \
    F(M, U32, threads, _, 0, 65535, REQ, "compute threads") \
    F(M, LIST, capabilities, capability, 0, MLAP_MAX_CAPABILITIES, REQ, "the capability table")

#define MLAP_FIELDS_query(F, M)

#define MLAP_FIELDS_report(F, M) \
    F(M, MSG, device, device, 0, 0, REQ, "state and figures; the answer to QUERY")

/* X(TYPE, message, number, fds, FROM, "documentation"); FROM is CLIENT, DAEMON or INTERNAL; fds is 0, or n for 1 to n
 * file descriptors */
#define MLAP_MESSAGES(X) \
    X(HELLO, hello, 1, 0, CLIENT, "The first message of a connection. Answer: WELCOME.") \
    X(WELCOME, welcome, 2, 0, DAEMON, "The session is open; its limits.") \
    X(OK, ok, 3, 0, DAEMON, "The message of the same sequence is done.") \
    X(ERROR, error, 4, 0, DAEMON, \
      "The message of the same sequence was refused or failed; sequence 0: the session ends.") \
    X(REGISTER, register, 5, 1, CLIENT, "Map a buffer. Answer: OK.") \
    X(UNREGISTER, unregister, 6, 0, CLIENT, "Unmap a buffer. Answer: OK, once no launch names it.") \
    X(PLAN, plan, 7, 0, CLIENT, "Validate and keep a descriptor. Answer: OK.") \
    X(DROP, drop, 8, 0, CLIENT, "Forget a plan. Answer: OK.") \
    X(DECODE, decode, 9, 0, CLIENT, "Run a descriptor once. Answer: DONE.") \
    X(SUBMIT, submit, 10, 0, CLIENT, "Run a plan. Answer: DONE.") \
    X(DONE, done, 11, 0, DAEMON, "A decode is complete; out and lse are written.") \
    X(STATUS, status, 12, 0, CLIENT, "Supervisor only. Answer: STATUS_REPLY.") \
    X(STATUS_REPLY, status_reply, 13, 0, DAEMON, "The daemon and its devices.") \
    X(CAPABILITIES, capabilities, 14, 0, CLIENT, "Supervisor only. Answer: CAPABILITIES_REPLY.") \
    X(CAPABILITIES_REPLY, capabilities_reply, 15, 0, DAEMON, "A device's capability table.") \
    X(SESSIONS, sessions, 16, 0, CLIENT, "Supervisor only. Answer: SESSIONS_REPLY.") \
    X(SESSIONS_REPLY, sessions_reply, 17, 0, DAEMON, "Sessions on a device.") \
    X(HEALTH, health, 18, 0, CLIENT, "Supervisor only. Answer: HEALTH_REPLY.") \
    X(HEALTH_REPLY, health_reply, 19, 0, DAEMON, "The daemon's judgement of itself.") \
    X(DRAIN, drain, 20, 0, CLIENT, "Supervisor only, admin users. Answer: OK, once nothing is in flight.") \
    X(EVICT, evict, 21, 0, CLIENT, "Supervisor only, admin users. Answer: OK, once the session is closed.") \
    X(IMPORT, import, 22, 0, CLIENT, "Map a buffer in GPU memory, on a GPU's device. Answer: OK.") \
    X(IMPORT_VMM, import_vmm, 23, MLAP_MAX_FDS, CLIENT, \
      "Map a buffer in GPU memory from cuMemCreate, by descriptors from cuMemExportToShareableHandle. Answer: OK.") \
    X(RING_MEMORY, ring_memory, 24, 1, DAEMON, "Unasked, before a WELCOME that grants rings: their memfd.") \
    X(KNOCK, knock, 25, 0, CLIENT, "Look at the submission ring. Sequence 0 and no answer.") \
    X(NEWS, news, 26, 0, DAEMON, "Unasked: look at the completion ring.") \
    X(STEP, step, 27, 0, CLIENT, \
      "Keep plans that a client's stream runs one after the other, and their flags. Answer: OK.") \
    X(STEP_DROP, step_drop, 28, 0, CLIENT, "Forget a step. Answer: OK.") \
    X(ARM, arm, 29, 0, CLIENT, \
      "Run a step's layers, each once its flag says that its inputs are written. Answer: DONE, with the failures of " \
      "all layers; TIMEOUT: the flags did not come for so long that nothing waits for them any more: arm the round " \
      "again.") \
    X(CONFIGURE, configure, 64, 0, INTERNAL, "Limits, at start and after a reload.") \
    X(ATTACH, attach, 65, 1, INTERNAL, "An accepted connection for this worker.") \
    X(READY, ready, 66, 0, INTERNAL, "The worker serves; its capability table.") \
    X(QUERY, query, 67, 0, INTERNAL, "Ask for a REPORT of the same sequence.") \
    X(REPORT, report, 68, 0, INTERNAL, "The worker's state; also its sign of life.")

#define MLAP_NESTED(X) X(tensor) X(scale) X(batch) X(failure) X(layer) X(latency) X(capability) X(device) X(session)

/* ---- C declarations drawn from the lists ---- */

#define MLAP_ENUMERATOR(M, NAME, text, doc) MLAP_##M##_##NAME,
#define MLAP_DECLARE_ENUM(M, doc) enum mlap_##M { MLAP_ENUM_##M(MLAP_ENUMERATOR, M) MLAP_##M##_COUNT };
MLAP_ENUMS(MLAP_DECLARE_ENUM)

#define MLAP_MEMBER_BOOL(name, sub, max) bool name;
#define MLAP_MEMBER_U32(name, sub, max) uint32_t name;
#define MLAP_MEMBER_U64(name, sub, max) uint64_t name;
#define MLAP_MEMBER_F64(name, sub, max) double name;
#define MLAP_MEMBER_STR(name, sub, max) char name[(max) + 1];
#define MLAP_MEMBER_ENUM(name, sub, max) enum mlap_##sub name;
#define MLAP_MEMBER_MSG(name, sub, max) struct mlap_##sub name;
#define MLAP_MEMBER_LIST(name, sub, max) uint32_t n_##name; struct mlap_##sub name[max];
#define MLAP_MEMBER(M, KIND, name, sub, min, max, NEED, doc) MLAP_MEMBER_##KIND(name, sub, max)
#define MLAP_INDEX(M, KIND, name, sub, min, max, NEED, doc) MLAP_INDEX_##M##_##name,

/* struct mlap_<message>: `present` has bit MLAP_INDEX_<message>_<field> for each field that is there.
 * An encoder writes REQ fields always and OPT fields when their bit is set. */
#define MLAP_DECLARE(M) \
    enum mlap_index_##M { MLAP_FIELDS_##M(MLAP_INDEX, M) MLAP_INDEX_##M##_COUNT }; \
    struct mlap_##M { uint64_t present; MLAP_FIELDS_##M(MLAP_MEMBER, M) };
#define MLAP_DECLARE_MESSAGE(TYPE, M, number, fds, FROM, doc) MLAP_DECLARE(M)
MLAP_NESTED(MLAP_DECLARE)
MLAP_MESSAGES(MLAP_DECLARE_MESSAGE)

#define MLAP_DECLARE_TYPE(TYPE, M, number, fds, FROM, doc) MLAP_##TYPE = number,
enum mlap_type { MLAP_MESSAGES(MLAP_DECLARE_TYPE) };

#define mlap_has(m, M, name) ((((m)->present) >> MLAP_INDEX_##M##_##name) & 1u)
#define mlap_set(m, M, name) ((m)->present |= UINT64_C(1) << MLAP_INDEX_##M##_##name)

#endif
