/* golden.c - one message of each type, with every optional field, as a struct and as the bytes it must be on the wire.
 * The bytes were made by another encoder (python3-msgpack); a change here is a change of the protocol. */
#include "golden.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ALL(M) ((UINT64_C(1) << MLAP_INDEX_##M##_COUNT) - 1)
#define TENSOR(id, bytes) {.present = ALL(tensor), .buffer = id, .offset = bytes}

#define BATCH \
    {.present = ALL(batch), .batch = 3, .heads = 16, .q_rows = 9, .q_dtype = MLAP_dtype_E4M3, \
    .kv_format = MLAP_kv_format_E4M3, .out_dtype = MLAP_dtype_FP16, .pages = 1000, .page_size = 64, \
    .page_stride = 36864, .row_stride = 576, .max_pages = 130, .softmax_scale = 0.125, .q = TENSOR(1, 0), \
    .kv = TENSOR(2, 1099511627776), .block_table = TENSOR(1, 65536), .seqlens = TENSOR(1, 66000), \
    .cu_q = TENSOR(1, 66064), .tree_mask = TENSOR(1, 66128), .sink = TENSOR(3, 0), \
    .q_scale = {.present = ALL(scale), .value = 0.5, .tensor = TENSOR(3, 64)}, .k_scale = {.present = ALL(scale), \
    .value = -2.0, .tensor = TENSOR(3, 68)}, .v_scale = {.present = ALL(scale), .value = 0.001, \
    .tensor = TENSOR(3, 72)}, .out = TENSOR(4, 0), .lse = TENSOR(4, 4096), .mask = MLAP_mask_TREE, \
    .lse_base = MLAP_lse_base_TWO, .dcp_world = 4, .dcp_rank = 3, .dcp_interleave = 16, .window = 4096, \
    .deterministic = true}

#define LAUNCHES .launches = 700, .launched_parts = 1001, .launched_rows = 9000
#define DEVICE \
    {.present = ALL(device), .name = "cpu", .state = MLAP_device_state_READY, .reason = "", .variant = "avx512", \
    .threads = 2, .pid = 4321, .restarts = 1, .uptime_ms = 123456, .responding = true, .sessions = 2, \
    .sessions_draining = 1, .buffers = 3, .plans = 4, .held_bytes = 4294967296, .orphaned_bytes = 0, .queued = 5, \
    .running = 1, .queue_limit = 256, .progress = 99999, .decodes = 1000, .decodes_failed = 2, .refused = 3, \
    .busy = 4, .dropped = 5, .kv_tokens = 34359738368, .kv_bytes = 35184372088832, LAUNCHES, .n_latency = 2, \
    .latency = {{.present = ALL(latency), .phase = MLAP_phase_RECEIVE, .count = 10, .sum_ns = 100000, \
    .p50_ns = 9000, .p90_ns = 15000, .p99_ns = 20000, .max_ns = 8589934592}, {.present = ALL(latency), \
    .phase = MLAP_phase_KERNEL, .count = 10, .sum_ns = 100000, .p50_ns = 9000, .p90_ns = 15000, .p99_ns = 20000, \
    .max_ns = 8589934592}}, .mps = "/run/mps", .mps_log = "/run/log"}

static const struct mlap_hello hello_body = {.present = ALL(hello), .client = "demo", .device = "cpu",
    .features = 0, .priority = MLAP_priority_HIGH, .gpu = "GPU-1", .mps = "/run/mps"};
static const struct mlap_welcome welcome_body = {.present = ALL(welcome), .daemon = "mlad 0.1.0", .session = 5,
    .device = "cpu", .features = 0, .max_message = 65536, .max_buffers = 64, .max_bytes = UINT64_MAX,
    .max_plans = 1024, .max_in_flight = 64, .mps = "/run/mps"};
static const struct mlap_ok ok_body = {};
static const struct mlap_ring_memory ring_memory_body = {.present = ALL(ring_memory), .entries = 256};
static const struct mlap_knock knock_body = {};
static const struct mlap_news news_body = {};
static const struct mlap_error error_body = {.present = ALL(error), .code = MLAP_code_RANGE, .field = "batch.kv",
    .message = "kv ends 64 bytes past the end of buffer 2"};
static const struct mlap_register register_body = {.present = ALL(register), .buffer = 4294967295,
    .kind = MLAP_buffer_kind_MEMFD, .offset = 4096, .bytes = 1073741824, .access = MLAP_access_READ};
static const struct mlap_import import_body = {.present = ALL(import), .buffer = 9,
    .handle = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
              "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
    .gpu = "GPU-1", .offset = 512, .bytes = 4096, .access = MLAP_access_READ};
static const struct mlap_step step_body = {.present = ALL(step), .step = 11, .slots = {3, 2, 128}, .n_layers = 2,
                                           .layers = {{1, 7}, {1, 8}}};
static const struct mlap_step_drop step_drop_body = {.present = ALL(step_drop), .step = 11};
static const struct mlap_arm arm_body = {.present = ALL(arm), .step = 11, .round = 70000};
static const struct mlap_import_vmm import_vmm_body = {.present = ALL(import_vmm), .buffer = 10, .gpu = "GPU-1",
    .allocation = 20 << 20, .offset = 512, .bytes = 40 << 20, .address = 0x7f3a00000200, .access = MLAP_access_READ};
static const struct mlap_unregister unregister_body = {.present = ALL(unregister), .buffer = 1};
static const struct mlap_plan plan_body = {.present = ALL(plan), .plan = 7, .batch = BATCH};
static const struct mlap_drop drop_body = {.present = ALL(drop), .plan = 7};
static const struct mlap_decode decode_body = {.present = ALL(decode), .batch = BATCH};
static const struct mlap_submit submit_body = {.present = ALL(submit), .plan = 7};
static const struct mlap_done done_body = {.present = ALL(done), .receive_ns = 4000, .queue_ns = 500,
    .kernel_ns = 90000, .kv_tokens = 4096, .failed = 2, .n_failures = 2, .failures = {{.present = ALL(failure),
    .request = 1, .field = "seqlens[1]", .message = "is -5"}, {.present = ALL(failure), .request = 300,
    .field = "block_table[300][7]", .message = "is past the pool"}}};
static const struct mlap_status status_body = {};
static const struct mlap_status_reply status_reply_body = {.present = ALL(status_reply), .daemon = "mlad 0.1.0",
    .pid = 100, .uptime_ms = 1000, .connections = 1, .denied = 0, .note = "no GPU", .n_devices = 2, .devices = {DEVICE,
    {.present = ALL(device), .name = "reference", .state = MLAP_device_state_RESTARTING, .reason = "it died",
    .variant = "avx512", .threads = 2, .pid = 4321, .restarts = 1, .uptime_ms = 123456, .responding = true,
    .sessions = 2, .sessions_draining = 1, .buffers = 3, .plans = 4, .held_bytes = 4294967296, .orphaned_bytes = 0,
    .queued = 5, .running = 1, .queue_limit = 256, .progress = 99999, .decodes = 1000, .decodes_failed = 2,
    .refused = 3, .busy = 4, .dropped = 5, .kv_tokens = 34359738368, .kv_bytes = 35184372088832, LAUNCHES,
    .n_latency = 0, .mps = "/run/mps", .mps_log = "/run/log"}}};
static const struct mlap_capabilities capabilities_body = {.present = ALL(capabilities), .device = "cpu"};
static const struct mlap_capabilities_reply capabilities_reply_body = {.present = ALL(capabilities_reply),
    .device = "cpu", .n_rows = 2, .rows = {{.present = ALL(capability), .variant = "avx2", .q_dtype = MLAP_dtype_BF16,
    .kv_format = MLAP_kv_format_E4M3_656, .out_dtype = MLAP_dtype_BF16, .mask = MLAP_mask_NONE, .max_heads = 128,
    .max_q_len = 64, .max_page_size = 256, .features = "ragged dcp"}, {.present = ALL(capability), .variant = "avx512",
    .q_dtype = MLAP_dtype_BF16, .kv_format = MLAP_kv_format_E4M3_656, .out_dtype = MLAP_dtype_BF16,
    .mask = MLAP_mask_CAUSAL, .max_heads = 128, .max_q_len = 64, .max_page_size = 256, .features = "ragged dcp"}}};
static const struct mlap_sessions sessions_body = {.present = ALL(sessions), .device = "cpu", .after = 64};
static const struct mlap_sessions_reply sessions_reply_body = {.present = ALL(sessions_reply), .device = "cpu",
    .n_sessions = 2, .sessions = {{.present = ALL(session), .session = 65, .uid = 1000, .pid = 77, .client =
    "engine ü", .age_ms = 5000, .draining = false, .buffers = 2, .bytes = 1048576, .plans = 1, .in_flight = 1,
    .decodes = 500,
    .kv_tokens = 2000000, .rings = true,
    .placement = MLAP_placement_OWN_GPU, .order = MLAP_order_HOST, .why = "why"},
    {.present = ALL(session), .session = 70, .uid = 1000, .pid = 77, .client = "engine ü",
    .age_ms = 5000, .draining = false, .buffers = 2, .bytes = 1048576, .plans = 1, .in_flight = 1,
    .decodes = 500,
    .kv_tokens = 2000000, .rings = false,
    .placement = MLAP_placement_OWN_GPU, .order = MLAP_order_HOST, .why = "why"}}, .more = true};
static const struct mlap_health health_body = {};
static const struct mlap_health_reply health_reply_body = {.present = ALL(health_reply),
    .health = MLAP_health_state_DEGRADED, .reason = "the worker of cpu has just restarted"};
static const struct mlap_drain drain_body = {.present = ALL(drain), .device = "cpu", .resume = true};
static const struct mlap_evict evict_body = {.present = ALL(evict), .device = "cpu", .session = 65};
static const struct mlap_configure configure_body = {.present = ALL(configure), .max_sessions = 64,
    .max_bytes = 68719476736, .max_buffers = 256, .max_plans = 1024, .max_in_flight = 64,
    .max_bytes_per_session = 4096, .max_in_flight_per_session = 32, .queue_limit = 1024, .log_level = 6,
    .draining = false, .stopping = true};
static const struct mlap_attach attach_body = {.present = ALL(attach), .session = 65, .uid = 1000, .pid = 77,
    .hello_seq = 1, .hello = {.present = ALL(hello), .client = "demo", .device = "cpu", .features = 0,
    .priority = MLAP_priority_NORMAL, .gpu = "GPU-1", .mps = "/run/mps"}};
static const struct mlap_ready ready_body = {.present = ALL(ready), .variant = "avx512", .threads = 2,
    .n_capabilities = 1, .capabilities = {{.present = ALL(capability), .variant = "avx512", .q_dtype = MLAP_dtype_BF16,
    .kv_format = MLAP_kv_format_E4M3_656, .out_dtype = MLAP_dtype_BF16, .mask = MLAP_mask_TREE, .max_heads = 128,
    .max_q_len = 64, .max_page_size = 256, .features = "ragged dcp"}}};
static const struct mlap_query query_body = {};
static const struct mlap_report report_body = {.present = ALL(report), .device = DEVICE};

const struct golden golden[] = {
    {MLAP_HELLO, 1, &hello_body, sizeof hello_body,
     "94 01 01 01 86 a6'client' a4'demo' a6'device' a3'cpu' a8'features' 00 a8'priority' a4'high' a3'gpu' a5'GPU-1' "
     "a3'mps' a8'/run/mps'"},
    {MLAP_WELCOME, 2, &welcome_body, sizeof welcome_body,
     "94 01 02 02 8a a6'daemon' aa'mlad 0.1.0' a7'session' 05 a6'device' a3'cpu' a8'features' 00 ab'max_message' "
     "ce00010000 ab'max_buffers' 40 a9'max_bytes' cfffffffffffffffff a9'max_plans' cd0400 ad'max_in_flight' 40 "
     "a3'mps' a8'/run/mps'"},
    {MLAP_OK, 3, &ok_body, sizeof ok_body,
     "94 01 03 03 80"},
    {MLAP_ERROR, 4, &error_body, sizeof error_body,
     "94 01 04 04 83 a4'code' a5'range' a5'field' a8'batch.kv' a7'message' "
     "d929'kv ends 64 bytes past the end of buffer 2'"},
    {MLAP_REGISTER, 5, &register_body, sizeof register_body,
     "94 01 05 05 85 a6'buffer' ceffffffff a4'kind' a5'memfd' a6'offset' cd1000 a5'bytes' ce40000000 a6'access' "
     "a4'read'"},
    {MLAP_UNREGISTER, 6, &unregister_body, sizeof unregister_body,
     "94 01 06 06 81 a6'buffer' 01"},
    {MLAP_PLAN, 7, &plan_body, sizeof plan_body,
     "94 01 07 07 82 a4'plan' 07 a5'batch' de001f a5'batch' 03 a5'heads' 10 a6'q_rows' 09 a7'q_dtype' a8'fp8_e4m3' "
     "a9'kv_format' a8'fp8_e4m3' a9'out_dtype' a4'fp16' a5'pages' cd03e8 a9'page_size' 40 ab'page_stride' cd9000 "
     "aa'row_stride' cd0240 a9'max_pages' cc82 ad'softmax_scale' cb3fc0000000000000 a1'q' 82 a6'buffer' 01 "
     "a6'offset' 00 a2'kv' 82 a6'buffer' 02 a6'offset' cf0000010000000000 ab'block_table' 82 a6'buffer' 01 "
     "a6'offset' ce00010000 a7'seqlens' 82 a6'buffer' 01 a6'offset' ce000101d0 a4'cu_q' 82 a6'buffer' 01 a6'offset' "
     "ce00010210 a9'tree_mask' 82 a6'buffer' 01 a6'offset' ce00010250 a4'sink' 82 a6'buffer' 03 a6'offset' 00 "
     "a7'q_scale' 82 a5'value' cb3fe0000000000000 a6'tensor' 82 a6'buffer' 03 a6'offset' 40 a7'k_scale' 82 a5'value' "
     "cbc000000000000000 a6'tensor' 82 a6'buffer' 03 a6'offset' 44 a7'v_scale' 82 a5'value' cb3f50624dd2f1a9fc "
     "a6'tensor' 82 a6'buffer' 03 a6'offset' 48 a3'out' 82 a6'buffer' 04 a6'offset' 00 a3'lse' 82 a6'buffer' 04 "
     "a6'offset' cd1000 a4'mask' a4'tree' a8'lse_base' a1'2' a9'dcp_world' 04 a8'dcp_rank' 03 ae'dcp_interleave' 10 "
     "a6'window' cd1000 ad'deterministic' c3"},
    {MLAP_DROP, 8, &drop_body, sizeof drop_body,
     "94 01 08 08 81 a4'plan' 07"},
    {MLAP_DECODE, 9, &decode_body, sizeof decode_body,
     "94 01 09 09 81 a5'batch' de001f a5'batch' 03 a5'heads' 10 a6'q_rows' 09 a7'q_dtype' a8'fp8_e4m3' a9'kv_format' "
     "a8'fp8_e4m3' a9'out_dtype' a4'fp16' a5'pages' cd03e8 a9'page_size' 40 ab'page_stride' cd9000 aa'row_stride' "
     "cd0240 a9'max_pages' cc82 ad'softmax_scale' cb3fc0000000000000 a1'q' 82 a6'buffer' 01 a6'offset' 00 a2'kv' 82 "
     "a6'buffer' 02 a6'offset' cf0000010000000000 ab'block_table' 82 a6'buffer' 01 a6'offset' ce00010000 a7'seqlens' "
     "82 a6'buffer' 01 a6'offset' ce000101d0 a4'cu_q' 82 a6'buffer' 01 a6'offset' ce00010210 a9'tree_mask' 82 "
     "a6'buffer' 01 a6'offset' ce00010250 a4'sink' 82 a6'buffer' 03 a6'offset' 00 a7'q_scale' 82 a5'value' "
     "cb3fe0000000000000 a6'tensor' 82 a6'buffer' 03 a6'offset' 40 a7'k_scale' 82 a5'value' cbc000000000000000 "
     "a6'tensor' 82 a6'buffer' 03 a6'offset' 44 a7'v_scale' 82 a5'value' cb3f50624dd2f1a9fc a6'tensor' 82 a6'buffer' "
     "03 a6'offset' 48 a3'out' 82 a6'buffer' 04 a6'offset' 00 a3'lse' 82 a6'buffer' 04 a6'offset' cd1000 a4'mask' "
     "a4'tree' a8'lse_base' a1'2' a9'dcp_world' 04 a8'dcp_rank' 03 ae'dcp_interleave' 10 a6'window' cd1000 "
     "ad'deterministic' c3"},
    {MLAP_SUBMIT, 300, &submit_body, sizeof submit_body,
     "94 01 0a cd012c 81 a4'plan' 07"},
    {MLAP_DONE, 300, &done_body, sizeof done_body,
     "94 01 0b cd012c 86 aa'receive_ns' cd0fa0 a8'queue_ns' cd01f4 a9'kernel_ns' ce00015f90 a9'kv_tokens' cd1000 "
     "a6'failed' 02 a8'failures' 92 83 a7'request' 01 a5'field' aa'seqlens[1]' a7'message' a5'is -5' 83 a7'request' "
     "cd012c a5'field' b3'block_table[300][7]' a7'message' b0'is past the pool'"},
    {MLAP_STATUS, 12, &status_body, sizeof status_body,
     "94 01 0c 0c 80"},
    {MLAP_STATUS_REPLY, 13, &status_reply_body, sizeof status_reply_body,
     "94 01 0d 0d 87 a6'daemon' aa'mlad 0.1.0' a3'pid' 64 a9'uptime_ms' cd03e8 ab'connections' 01 a6'denied' 00 "
     "a7'devices' 92 de0020 a4'name' a3'cpu' a5'state' a5'ready' a6'reason' a0'' a7'variant' a6'avx512' a7'threads' "
     "02 a3'pid' cd10e1 a8'restarts' 01 a9'uptime_ms' ce0001e240 aa'responding' c3 a8'sessions' 02 "
     "b1'sessions_draining' 01 a7'buffers' 03 a5'plans' 04 aa'held_bytes' cf0000000100000000 ae'orphaned_bytes' 00 "
     "a6'queued' 05 a7'running' 01 ab'queue_limit' cd0100 a8'progress' ce0001869f a7'decodes' cd03e8 "
     "ae'decodes_failed' 02 a7'refused' 03 a4'busy' 04 a7'dropped' 05 a9'kv_tokens' cf0000000800000000 a8'kv_bytes' "
     "cf0000200000000000 a8'launches' cd02bc ae'launched_parts' cd03e9 ad'launched_rows' cd2328 a7'latency' 92 87 "
     "a5'phase' a7'receive' a5'count' 0a a6'sum_ns' ce000186a0 a6'p50_ns' cd2328 a6'p90_ns' cd3a98 a6'p99_ns' "
     "cd4e20 a6'max_ns' cf0000000200000000 87 a5'phase' a6'kernel' a5'count' 0a a6'sum_ns' ce000186a0 a6'p50_ns' "
     "cd2328 a6'p90_ns' cd3a98 a6'p99_ns' cd4e20 a6'max_ns' cf0000000200000000 a3'mps' a8'/run/mps' a7'mps_log' "
     "a8'/run/log' de0020 a4'name' a9'reference' a5'state' aa'restarting' a6'reason' a7'it died' a7'variant' "
     "a6'avx512' a7'threads' 02 a3'pid' cd10e1 a8'restarts' 01 a9'uptime_ms' ce0001e240 aa'responding' c3 "
     "a8'sessions' 02 b1'sessions_draining' 01 a7'buffers' 03 a5'plans' 04 aa'held_bytes' cf0000000100000000 "
     "ae'orphaned_bytes' 00 a6'queued' 05 a7'running' 01 ab'queue_limit' cd0100 a8'progress' ce0001869f a7'decodes' "
     "cd03e8 ae'decodes_failed' 02 a7'refused' 03 a4'busy' 04 a7'dropped' 05 a9'kv_tokens' cf0000000800000000 "
     "a8'kv_bytes' cf0000200000000000 a8'launches' cd02bc ae'launched_parts' cd03e9 ad'launched_rows' cd2328 "
     "a7'latency' 90 a3'mps' a8'/run/mps' a7'mps_log' a8'/run/log' a4'note' a6'no GPU'"},
    {MLAP_CAPABILITIES, 14, &capabilities_body, sizeof capabilities_body,
     "94 01 0e 0e 81 a6'device' a3'cpu'"},
    {MLAP_CAPABILITIES_REPLY, 15, &capabilities_reply_body, sizeof capabilities_reply_body,
     "94 01 0f 0f 82 a6'device' a3'cpu' a4'rows' 92 89 a7'variant' a4'avx2' a7'q_dtype' a4'bf16' a9'kv_format' "
     "a7'fp8_656' a9'out_dtype' a4'bf16' a4'mask' a4'none' a9'max_heads' cc80 a9'max_q_len' 40 ad'max_page_size' "
     "cd0100 a8'features' aa'ragged dcp' 89 a7'variant' a6'avx512' a7'q_dtype' a4'bf16' a9'kv_format' a7'fp8_656' "
     "a9'out_dtype' a4'bf16' a4'mask' a6'causal' a9'max_heads' cc80 a9'max_q_len' 40 ad'max_page_size' cd0100 "
     "a8'features' aa'ragged dcp'"},
    {MLAP_SESSIONS, 16, &sessions_body, sizeof sessions_body,
     "94 01 10 10 82 a6'device' a3'cpu' a5'after' 40"},
    {MLAP_SESSIONS_REPLY, 17, &sessions_reply_body, sizeof sessions_reply_body,
     "94 01 11 11 83 a6'device' a3'cpu' a8'sessions' 92 de0010 a7'session' 41 a3'uid' cd03e8 a3'pid' 4d a6'client' "
     "a9'engine ü' a6'age_ms' cd1388 a8'draining' c2 a7'buffers' 02 a5'bytes' ce00100000 a5'plans' 01 a9'in_flight' "
     "01 a7'decodes' cd01f4 a9'kv_tokens' ce001e8480 a5'rings' c3 a9'placement' a7'own_gpu' a5'order' a4'host' "
     "a3'why' a3'why' de0010 a7'session' 46 a3'uid' cd03e8 a3'pid' 4d a6'client' a9'engine ü' a6'age_ms' cd1388 "
     "a8'draining' c2 a7'buffers' 02 a5'bytes' ce00100000 a5'plans' 01 a9'in_flight' 01 a7'decodes' cd01f4 "
     "a9'kv_tokens' ce001e8480 a5'rings' c2 a9'placement' a7'own_gpu' a5'order' a4'host' a3'why' a3'why' a4'more' "
     "c3"},
    {MLAP_HEALTH, 18, &health_body, sizeof health_body,
     "94 01 12 12 80"},
    {MLAP_HEALTH_REPLY, 19, &health_reply_body, sizeof health_reply_body,
     "94 01 13 13 82 a6'health' a8'degraded' a6'reason' d924'the worker of cpu has just restarted'"},
    {MLAP_DRAIN, 20, &drain_body, sizeof drain_body,
     "94 01 14 14 82 a6'device' a3'cpu' a6'resume' c3"},
    {MLAP_EVICT, 21, &evict_body, sizeof evict_body,
     "94 01 15 15 82 a6'device' a3'cpu' a7'session' 41"},
    {MLAP_IMPORT, 24, &import_body, sizeof import_body,
     "94 01 16 18 86 a6'buffer' 09 a6'handle' "
     "d980'0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
     "0123456789abcdef0123456789abcdef' a3'gpu' a5'GPU-1' a6'offset' cd0200 a5'bytes' cd1000 a6'access' a4'read'"},
    {MLAP_IMPORT_VMM, 27, &import_vmm_body, sizeof import_vmm_body,
     "94 01 17 1b 87 a6'buffer' 0a a3'gpu' a5'GPU-1' aa'allocation' ce01400000 a6'offset' cd0200 a5'bytes' ce02800000 "
     "a7'address' cf00007f3a00000200 a6'access' a4'read'"},
    {MLAP_RING_MEMORY, 0, &ring_memory_body, sizeof ring_memory_body,
     "94 01 18 00 81 a7'entries' cd0100"},
    {MLAP_KNOCK, 0, &knock_body, sizeof knock_body,
     "94 01 19 00 80"},
    {MLAP_NEWS, 0, &news_body, sizeof news_body,
     "94 01 1a 00 80"},
    {MLAP_STEP, 28, &step_body, sizeof step_body,
     "94 01 1b 1c 83 a4'step' 0b a5'slots' 82 a6'buffer' 02 a6'offset' cc80 a6'layers' 92 81 a4'plan' 07 "
     "81 a4'plan' 08"},
    {MLAP_STEP_DROP, 29, &step_drop_body, sizeof step_drop_body,
     "94 01 1c 1d 81 a4'step' 0b"},
    {MLAP_ARM, 30, &arm_body, sizeof arm_body,
     "94 01 1d 1e 82 a4'step' 0b a5'round' ce00011170"},
    {MLAP_CONFIGURE, 22, &configure_body, sizeof configure_body,
     "94 01 40 16 8b ac'max_sessions' 40 a9'max_bytes' cf0000001000000000 ab'max_buffers' cd0100 a9'max_plans' "
     "cd0400 ad'max_in_flight' 40 b5'max_bytes_per_session' cd1000 b9'max_in_flight_per_session' 20 "
     "ab'queue_limit' cd0400 a9'log_level' 06 a8'draining' c2 a8'stopping' c3"},
    {MLAP_ATTACH, 23, &attach_body, sizeof attach_body,
     "94 01 41 17 85 a7'session' 41 a3'uid' cd03e8 a3'pid' 4d a9'hello_seq' 01 a5'hello' 86 a6'client' a4'demo' "
     "a6'device' a3'cpu' a8'features' 00 a8'priority' a6'normal' a3'gpu' a5'GPU-1' a3'mps' a8'/run/mps'"},
    {MLAP_READY, 24, &ready_body, sizeof ready_body,
     "94 01 42 18 83 a7'variant' a6'avx512' a7'threads' 02 ac'capabilities' 91 89 a7'variant' a6'avx512' a7'q_dtype' "
     "a4'bf16' a9'kv_format' a7'fp8_656' a9'out_dtype' a4'bf16' a4'mask' a4'tree' a9'max_heads' cc80 a9'max_q_len' "
     "40 ad'max_page_size' cd0100 a8'features' aa'ragged dcp'"},
    {MLAP_QUERY, 25, &query_body, sizeof query_body,
     "94 01 43 19 80"},
    {MLAP_REPORT, 26, &report_body, sizeof report_body,
     "94 01 44 1a 81 a6'device' de0020 a4'name' a3'cpu' a5'state' a5'ready' a6'reason' a0'' a7'variant' a6'avx512' "
     "a7'threads' 02 a3'pid' cd10e1 a8'restarts' 01 a9'uptime_ms' ce0001e240 aa'responding' c3 a8'sessions' 02 "
     "b1'sessions_draining' 01 a7'buffers' 03 a5'plans' 04 aa'held_bytes' cf0000000100000000 ae'orphaned_bytes' 00 "
     "a6'queued' 05 a7'running' 01 ab'queue_limit' cd0100 a8'progress' ce0001869f a7'decodes' cd03e8 "
     "ae'decodes_failed' 02 a7'refused' 03 a4'busy' 04 a7'dropped' 05 a9'kv_tokens' cf0000000800000000 a8'kv_bytes' "
     "cf0000200000000000 a8'launches' cd02bc ae'launched_parts' cd03e9 ad'launched_rows' cd2328 a7'latency' 92 87 "
     "a5'phase' a7'receive' a5'count' 0a a6'sum_ns' ce000186a0 a6'p50_ns' cd2328 a6'p90_ns' cd3a98 a6'p99_ns' "
     "cd4e20 a6'max_ns' cf0000000200000000 87 a5'phase' a6'kernel' a5'count' 0a a6'sum_ns' ce000186a0 a6'p50_ns' "
     "cd2328 a6'p90_ns' cd3a98 a6'p99_ns' cd4e20 a6'max_ns' cf0000000200000000 a3'mps' a8'/run/mps' a7'mps_log' "
     "a8'/run/log'"},
};
const size_t n_golden = sizeof golden / sizeof golden[0];

size_t golden_bytes(const char *notation, unsigned char bytes[MLAP_MAX_MESSAGE])
{
    size_t length = 0;
    for (const char *at = notation; *at != '\0';) {
        if (*at == '\'') {
            size_t text = strcspn(at + 1, "'");
            memcpy(bytes + length, at + 1, text);
            length += text;
            at += text + 2;
        } else if (*at == ' ') {
            at++;
        } else {
            unsigned byte;
            if (sscanf(at, "%2x", &byte) != 1)
                abort();
            bytes[length++] = (unsigned char)byte;
            at += 2;
        }
    }
    return length;
}
