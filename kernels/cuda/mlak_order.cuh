/* mlak_order.cuh - the two kernels around a launch in a client's stream order: see mlak_order.h.
 *
 * Client memory is as hostile here as anywhere: the flags decide when something runs and for whom it is signalled,
 * never an address. */
#include "mlak_order.h"
#include "mlak_order_ptx.cuh"

__device__ static inline bool order_reached(uint32_t at, uint32_t round)
{
    return (int32_t)(at - round) >= 0;
}

/* Whether the launch is to run, once that is known. */
__device__ static uint32_t order_wait(const struct mlak_cuda_order *order, uint32_t round)
{
    enum { LOOKS = 128 }; /* at the flag for each at the clock and the lane */
    if (order_reached(order_acquire((const uint32_t *)order->done), round)) /* the low half */
        return MLAK_ORDER_SERVED;
    const uint64_t start = order_now_ns();
    for (uint32_t looks = 0;; looks++) {
        if (looks % LOOKS == 0 && (order_look(&order->lane->stopped) || order_look(&order->lane->abandoned)))
            return MLAK_ORDER_STOPPED;
        if (order_reached(order_acquire(order->go), round)) {
            const uint64_t now = order_now_ns();
            order->lane->gate_ns = now - start;
            order->lane->went = now;
            return MLAK_ORDER_RAN;
        }
        if (looks % LOOKS == LOOKS - 1 && order_now_ns() - start > order->wait_ns) {
            order->lane->stopped = 1;
            return MLAK_ORDER_STOPPED;
        }
        order_pause();
    }
}

ORDER_KERNEL(mlak_cuda_gate, 1, struct mlak_cuda_order order)
{
    uint32_t outcome = order_wait(&order, *order.round);
    order.schedule->cancelled[0] = outcome == MLAK_ORDER_RAN ? 0 : order.ticket;
    order.lane->outcome = outcome;
}

__device__ static void order_fill(void *memory, uint64_t bytes)
{
    for (uint64_t i = ORDER_THREAD; i < bytes / 2; i += ORDER_THREADS)
        ((uint16_t *)memory)[i] = 0xffff; /* NaN in bf16 and fp16, and in fp32 two of them */
}

/* The rows of out and lse of a request that failed. */
__device__ static void order_fill_row(const struct mlak_row *row)
{
    uint64_t folded = (uint64_t)row->q_len * row->heads;
    order_fill(row->out, folded * MLAK_V * 2);
    if (row->lse != NULL)
        order_fill(row->lse, folded * sizeof *row->lse);
}

/* Whether one of this thread's requests failed. */
__device__ static bool order_failed(const struct mlak_cuda_order *order)
{
    bool failed = false;
    for (uint32_t i = ORDER_THREAD; i < order->count; i += ORDER_THREADS)
        failed |= order->rows[i].code != MLAK_ROW_OK;
    return failed;
}

/* Tell the client's stream, as soon as may be. */
__device__ static void order_signal(const struct mlak_cuda_order *order, bool refused, bool failed)
{
    if (refused) {
        order_fill(order->out, order->out_bytes);
        order_fill(order->lse, order->lse_bytes);
    }
    for (uint32_t i = 0; failed && i < order->count; i++)
        if (order->rows[i].code != MLAK_ROW_OK)
            order_fill_row(&order->rows[i]);
    if (refused || failed)
        order_barrier();
    uint64_t status = refused ? MLAK_MAIL_BATCH : failed ? MLAK_MAIL_REQUESTS : MLAK_MAIL_OK;
    if (ORDER_THREAD == 0)
        publish(order->done, status << 32 | *order->round);
}

struct order_sums {
    uint32_t failed, first;
    unsigned long long kv_tokens;
    uint64_t done; /* when the client's stream was told */
};

__device__ static void order_count(const struct mlak_cuda_order *order, struct order_sums *sums)
{
    for (uint32_t i = ORDER_THREAD; i < order->count; i += ORDER_THREADS) {
        const struct mlak_row *row = &order->rows[i];
        if (row->code == MLAK_ROW_OK) {
            order_add(&sums->kv_tokens, (unsigned long long)row->local_len);
        } else {
            order_add(&sums->failed, 1u);
            order_least(&sums->first, i);
        }
    }
}

__device__ static void order_report(const struct mlak_cuda_order *order, const struct order_sums *sums, int32_t refused)
{
    struct mlak_cuda_order_result *result = order->result;
    result->outcome = order->lane->outcome;
    result->batch_code = refused;
    result->batch_index = order->launched->sources[0].index;
    result->batch_value = order->launched->sources[0].value;
    result->batch_before = order->launched->sources[0].before;
    result->kv_tokens = sums->kv_tokens;
    result->gate_ns = order->lane->gate_ns;
    result->serve_ns = sums->done - order->lane->went;
    result->failed = sums->failed;
    if (sums->failed) {
        const struct mlak_row *row = &order->rows[sums->first];
        result->first = sums->first;
        result->code = row->code;
        result->detail[0] = row->detail[0];
        result->detail[1] = row->detail[1];
    }
    write_for_host(order->life, ++order->lane->life);
    order_release(&result->ended, *order->round);
}

ORDER_KERNEL(mlak_cuda_signal, MLAK_CUDA_SIGNAL_THREADS, struct mlak_cuda_order order)
{
    ORDER_SHARED struct order_sums sums;
    const bool ran = order.schedule->cancelled[0] != order.ticket;
    const int32_t refused = ran ? order.schedule->refused[0] : MLAK_OK;
    if (ORDER_THREAD == 0) {
        sums.failed = 0;
        sums.first = UINT32_MAX;
        sums.kv_tokens = 0;
    }
    const bool failed = order_any(order_failed(&order)) && ran && !refused; /* else the rows are an earlier launch's */
    if (ran)
        order_signal(&order, refused, failed);
    if (ORDER_THREAD == 0)
        sums.done = order_now_ns();
    if (ran && !refused)
        order_count(&order, &sums);
    order_barrier();
    if (ORDER_THREAD != 0)
        return;
    order.schedule->cancelled[0] = 0;
    order_report(&order, &sums, refused);
}
