/* layout.c - the layout of mla.h's structures as this compiler has it: "structure field offset", "structure - size". */
#include <mla.h>

#include <stddef.h>
#include <stdio.h>

#define SIZE(type) printf(#type " - %zu\n", sizeof(type));
#define FIELD(type, field) printf(#type " " #field " %zu\n", offsetof(type, field));

int main(void)
{
    SIZE(mla_error) FIELD(mla_error, code) FIELD(mla_error, field) FIELD(mla_error, message)
    SIZE(mla_options) FIELD(mla_options, struct_size) FIELD(mla_options, socket) FIELD(mla_options, device)
    FIELD(mla_options, name) FIELD(mla_options, reconnect_ms) FIELD(mla_options, transport) FIELD(mla_options, high_priority)
    SIZE(mla_tensor) FIELD(mla_tensor, buffer) FIELD(mla_tensor, offset)
    SIZE(mla_scale) FIELD(mla_scale, kind) FIELD(mla_scale, value) FIELD(mla_scale, tensor)
    SIZE(mla_batch) FIELD(mla_batch, struct_size) FIELD(mla_batch, batch) FIELD(mla_batch, heads)
    FIELD(mla_batch, q_rows) FIELD(mla_batch, q_dtype) FIELD(mla_batch, out_dtype) FIELD(mla_batch, kv_format)
    FIELD(mla_batch, pages) FIELD(mla_batch, page_size) FIELD(mla_batch, max_pages) FIELD(mla_batch, page_stride)
    FIELD(mla_batch, row_stride) FIELD(mla_batch, softmax_scale) FIELD(mla_batch, q) FIELD(mla_batch, kv)
    FIELD(mla_batch, block_table) FIELD(mla_batch, seqlens) FIELD(mla_batch, cu_q) FIELD(mla_batch, tree_mask)
    FIELD(mla_batch, sink) FIELD(mla_batch, q_scale) FIELD(mla_batch, k_scale) FIELD(mla_batch, v_scale)
    FIELD(mla_batch, out) FIELD(mla_batch, lse) FIELD(mla_batch, mask) FIELD(mla_batch, lse_base)
    FIELD(mla_batch, dcp_world) FIELD(mla_batch, dcp_rank) FIELD(mla_batch, dcp_interleave) FIELD(mla_batch, window)
    FIELD(mla_batch, deterministic)
    SIZE(mla_failure) FIELD(mla_failure, request) FIELD(mla_failure, field) FIELD(mla_failure, message)
    SIZE(mla_result) FIELD(mla_result, failed) FIELD(mla_result, listed) FIELD(mla_result, failures)
    FIELD(mla_result, kv_tokens) FIELD(mla_result, receive_ns) FIELD(mla_result, queue_ns)
    FIELD(mla_result, kernel_ns) FIELD(mla_result, replays)
    return 0;
}
