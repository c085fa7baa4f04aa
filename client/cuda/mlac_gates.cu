/* mlac_gates.cu - the client's side of stream order, three kernels of one block that libmla puts on its caller's
 * stream:
 *
 *     mlac_arm      begins a round of a step
 *     mlac_signal   says that a layer's inputs are written
 *     mlac_gate     waits until its outputs are, at most wait_ns or until libmla releases the round; a round that went
 *                   wrong leaves NaN in them and a note for the host, never what they held before
 *
 * All are captured with constant parameters: the round lies in the mailbox. A replay that nobody armed finds its round
 * signalled already, and is one that went wrong. One thread waits; the block's others help to fill. */
#include "mlac_gates.h"
#include "mlac_gates_ptx.cuh"

__device__ static inline bool reached(uint32_t at, uint32_t round)
{
    return (int32_t)(at - round) >= 0;
}

GATE_KERNEL(mlac_arm, 1, struct mlac_gate gate)
{
    gate.head->round++;
}

GATE_KERNEL(mlac_signal, 1, struct mlac_gate gate)
{
    uint32_t round = gate.advance ? ++gate.head->round : gate.head->round;
    gate.slot->unarmed = gate.slot->go == round;
    gate_release(&gate.slot->go, round); /* after all that the stream did before */
}

__device__ static uint32_t await(const struct mlac_gate *gate, uint32_t round)
{
    enum { LOOKS = 128 }; /* at the flag for each at the clock and at what libmla says */
    if (gate->slot->unarmed)
        return MLAP_MAIL_UNARMED;
    const uint64_t *done = (const uint64_t *)&gate->slot->done, start = gate_now_ns();
    for (uint32_t looks = 1;; looks++) {
        const uint64_t said = gate_acquire_64(done); /* with the status in the high half */
        if (reached((uint32_t)said, round))
            return (uint32_t)(said >> 32);
        if (looks % LOOKS == 0) {
            if (reached(gate_acquire(&gate->head->release), round))
                return MLAP_MAIL_RELEASED;
            if (gate_now_ns() - start > gate->wait_ns)
                return MLAP_MAIL_LATE;
        }
        gate_pause();
    }
}

__device__ static void fill(void *memory, uint64_t bytes)
{
    for (uint64_t i = GATE_THREAD; i < bytes / 2; i += GATE_THREADS)
        ((uint16_t *)memory)[i] = 0xffff; /* NaN in bf16 and fp16, and in fp32 two of them */
}

GATE_KERNEL(mlac_gate, MLAC_GATE_THREADS, struct mlac_gate gate)
{
    GATE_SHARED uint32_t what;
    const uint32_t round = gate.slot->go;
    if (GATE_THREAD == 0)
        what = await(&gate, round);
    gate_barrier();
    if (what == MLAP_MAIL_OK)
        return;
    if (what >= MLAP_MAIL_UNARMED) { /* otherwise the daemon has filled what failed */
        fill(gate.out, gate.out_bytes);
        fill(gate.lse, gate.lse_bytes);
    }
    gate_barrier();
    if (GATE_THREAD != 0)
        return;
    gate.notes->what = what;
    gate.notes->layer = gate.layer;
    gate.notes->round = round;
    gate_release(&gate.notes->count, gate.notes->count + 1);
}
