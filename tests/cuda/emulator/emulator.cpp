/* emulator.cpp - see emulator.h. Each thread of a block is a fiber with a stack of its own; they take turns on the
 * calling thread. A fiber runs until it needs others: its warp for an instruction of the whole warp, its block at a
 * barrier. The last one to arrive does the work for all, and the others find their results when their turn comes. */
#include "emulator.h"
#include "fibers.h"
#include "mlak_convert.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

emulated_gpu gpu;

void fault(const char *what)
{
    fprintf(stderr, "emulator: block %u, thread %u: %s\n", gpu.block_index, gpu.current, what);
    abort();
}

/* ---- fibers ---- */

#if defined(__x86_64__)
extern "C" void emulator_switch(void **save, void *load);
asm(R"(
.text
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
static void switch_to(fiber *from, fiber *to)
{
    emulator_switch(&from->stack_pointer, to->stack_pointer);
}
#else
static void switch_to(fiber *from, fiber *to)
{
    swapcontext(&from->context, &to->context);
}
#endif

static void fiber_main()
{
    gpu.kernel(*gpu.job);
    fiber *self = &gpu.fibers[gpu.current];
    self->done = true;
    for (;;)
        switch_to(self, &gpu.scheduler);
}

static void fiber_prepare(fiber *fiber)
{
    if (!fiber->stack) {
        void *stack = mmap(NULL, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (stack == MAP_FAILED)
            fault("no memory for a stack");
        fiber->stack = (unsigned char *)stack;
    }
    fiber->waits = NULL;
    fiber->done = false;
    fiber->copies.clear();
    fiber->groups = 0;
    fiber->begun = false;
    fiber->products.clear();
    fiber->at_work.clear();
    fiber->product_groups = 0;
#if defined(__x86_64__)
    void **top =
        (void **)(fiber->stack + STACK_BYTES - 64); /* as after a call: 16-byte aligned but for the return address */
    *--top = NULL;
    *--top = (void *)fiber_main;
    top -= 6; /* the saved registers */
    fiber->stack_pointer = top;
#else
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack;
    fiber->context.uc_stack.ss_size = STACK_BYTES;
    fiber->context.uc_link = NULL;
    makecontext(&fiber->context, fiber_main, 0);
#endif
}

static bool fiber_can_run(const fiber *fiber)
{
    return !fiber->done && (!fiber->waits || fiber->waits->held > fiber->waits_for);
}

/* What everybody waits for, neighbours who wait for the same in one line. */
[[noreturn]] static void fault_deadlock()
{
    for (uint32_t first = 0, next; first < gpu.threads; first = next) {
        const meeting *waits = gpu.fibers[first].waits;
        for (next = first + 1; next < gpu.threads && gpu.fibers[next].waits == waits; next++)
            ;
        if (gpu.fibers[first].done)
            fprintf(stderr, "threads %u to %u: at their end\n", first, next - 1);
        else
            fprintf(stderr, "threads %u to %u: wait for %s %u, phase %llu: %u of %u have arrived, %lld bytes to come\n",
                    first, next - 1, waits->name, waits->number, (unsigned long long)waits->held, waits->arrived,
                    waits->size, (long long)waits->bytes);
    }
    fault("every thread waits for another one: a barrier that some do not reach");
}

/* All threads of a block to their end; a warp goes on as long as it can by itself. */
static void run_block()
{
    uint32_t done = 0;
    while (done < gpu.threads) {
        bool moved = false;
        for (uint32_t first = 0; first < gpu.threads; first += WARP)
            for (bool again = true; again;) {
                again = false;
                for (uint32_t i = first; i < first + WARP && i < gpu.threads; i++) {
                    fiber *fiber = &gpu.fibers[i];
                    if (!fiber_can_run(fiber))
                        continue;
                    fiber->waits = NULL;
                    gpu.current = i;
                    switch_to(&gpu.scheduler, fiber);
                    done += fiber->done;
                    moved = again = true;
                }
            }
        if (!moved && done < gpu.threads && !hopper_go_on())
            fault_deadlock();
    }
    hopper_end();
}

void await_meeting(meeting *meeting)
{
    fiber *self = &gpu.fibers[gpu.current];
    self->waits = meeting;
    self->waits_for = meeting->held;
    switch_to(self, &gpu.scheduler);
}

bool meet(meeting *meeting, uint32_t place, void *argument)
{
    if (argument)
        meeting->arguments[place] = argument;
    if (++meeting->arrived == meeting->size)
        return true;
    await_meeting(meeting);
    return false;
}

void leave(meeting *meeting)
{
    meeting->arrived = 0;
    meeting->held++;
}

meeting *warp()
{
    return &gpu.warps[gpu.current / WARP];
}
uint32_t lane()
{
    return gpu.current % WARP;
}

/* ---- the words of CUDA ---- */

emulated_index emulated_thread()
{
    return {gpu.current};
}
emulated_index emulated_block()
{
    return {gpu.block_index};
}
emulated_index emulated_grid()
{
    return {gpu.grid};
}
unsigned char *emulated_shared()
{
    return gpu.shared;
}
uint32_t shared_bytes()
{
    return (uint32_t)gpu.shared_size;
}

void __syncthreads()
{
    if (meet(&gpu.block, 0, NULL))
        leave(&gpu.block);
}

const unsigned char *in_shared(const void *pointer)
{
    const unsigned char *at = (const unsigned char *)pointer;
    if (at < gpu.shared || at + 16 > gpu.shared + gpu.shared_size || (uintptr_t)at % 16)
        fault("16 bytes outside shared memory, or not aligned");
    return at;
}

void copy_async(void *to, const void *from, bool valid)
{
    fiber *self = &gpu.fibers[gpu.current];
    in_shared(to);
    if (valid && (uintptr_t)from % 16)
        fault("cp.async from an address that is not aligned");
    memset(to, 0xff, 16); /* until it is waited for, nobody knows what is there */
    self->copies.push_back({to, from, valid, self->groups});
}

void copy_land(const copy *copy)
{
    if (copy->valid)
        memcpy(copy->to, copy->from, 16);
    else
        memset(copy->to, 0, 16);
}

void copy_commit()
{
    gpu.fibers[gpu.current].groups++;
}

void emulated_copy_wait(int pending)
{
    fiber *self = &gpu.fibers[gpu.current];
    size_t left = 0;
    for (const copy &copy : self->copies) {
        if (copy.group + (uint32_t)pending >= self->groups) {
            self->copies[left++] = copy;
            continue;
        }
        copy_land(&copy);
    }
    self->copies.resize(left);
}

struct shuffled {
    float value, result;
    uint32_t from;
};
float __shfl_sync(uint32_t mask, float value, int from)
{
    shuffled own = {value, 0, (uint32_t)from % WARP};
    if (mask != 0xffffffff)
        fault("only whole warps shuffle here");
    if (meet(warp(), lane(), &own)) {
        shuffled **all = (shuffled **)warp()->arguments;
        for (uint32_t i = 0; i < WARP; i++)
            all[i]->result = all[all[i]->from]->value;
        leave(warp());
    }
    return own.result;
}

float __shfl_xor_sync(uint32_t mask, float value, int lanes)
{
    return __shfl_sync(mask, value, (int)lane() ^ lanes);
}

/* ---- matrices ---- */

struct load {
    const unsigned char *row;
    uint32_t *r;
    bool transposed;
};

static uint32_t element(load *const *all, uint32_t matrix, uint32_t row, uint32_t column)
{
    uint16_t value;
    memcpy(&value, all[matrix * 8 + row]->row + column * 2, sizeof value);
    return value;
}

static void load_all(uint32_t r[4], const void *row, bool transposed)
{
    load own = {in_shared(row), r, transposed};
    if (!meet(warp(), lane(), &own))
        return;
    load *const *all = (load *const *)warp()->arguments;
    for (uint32_t l = 0; l < WARP; l++)
        for (uint32_t m = 0; m < 4; m++) {
            uint32_t g = l / 4, i = l % 4 * 2;
            all[l]->r[m] = transposed ? element(all, m, i, g) | element(all, m, i + 1, g) << 16
                                      : element(all, m, g, i) | element(all, m, g, i + 1) << 16;
        }
    leave(warp());
}

void load_matrices(uint32_t r[4], const void *row)
{
    load_all(r, row, false);
}
void load_matrices_transposed(uint32_t r[4], const void *row)
{
    load_all(r, row, true);
}

struct product {
    float *c;
    const uint32_t *a;
    uint32_t b[2];
};

static void multiply_all(product *const *all, float (*decode)(uint16_t))
{
    float a[16][16], b[16][8];
    for (uint32_t l = 0; l < WARP; l++)
        for (uint32_t i = 0; i < 4; i++)
            for (uint32_t half = 0; half < 2; half++) {
                uint32_t row = l / 4 + i % 2 * 8, column = l % 4 * 2 + i / 2 * 8 + half;
                a[row][column] = decode((uint16_t)(all[l]->a[i] >> (16 * half)));
                if (i < 2)
                    b[l % 4 * 2 + i * 8 + half][l / 4] = decode((uint16_t)(all[l]->b[i] >> (16 * half)));
            }
    for (uint32_t l = 0; l < WARP; l++)
        for (uint32_t i = 0; i < 4; i++) {
            uint32_t row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
            float sum = all[l]->c[i];
            for (uint32_t k = 0; k < 16; k++)
                sum += a[row][k] * b[k][column];
            all[l]->c[i] = sum;
        }
}

static void multiply(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1, float (*decode)(uint16_t))
{
    product own = {c, a, {b0, b1}};
    if (!meet(warp(), lane(), &own))
        return;
    multiply_all((product *const *)warp()->arguments, decode);
    leave(warp());
}

void multiply_bf16(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    multiply(c, a, b0, b1, mlak_bf16_to_float);
}
void multiply_fp16(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    multiply(c, a, b0, b1, mlak_fp16_to_float);
}
uint32_t pack_bf16(float low, float high)
{
    return mlak_float_to_bf16(low) | (uint32_t)mlak_float_to_bf16(high) << 16;
}
uint32_t pack_fp16(float low, float high)
{
    return mlak_float_to_fp16(low) | (uint32_t)mlak_float_to_fp16(high) << 16;
}

/* ---- kernels ---- */

#define KERNELS(K)                                                                                                     \
    K(prepare) K(split_bf16) K(split_fp16) K(split_fp8) K(split_bf16_fp8) K(split_bf16_656) K(split_wide_bf16)         \
    K(split_wide_fp16) K(split_wide_fp8) K(split_wide_bf16_fp8) K(split_wide_bf16_656)                   \
    K(split_wgmma_bf16) K(split_wgmma_fp16) K(combine)
#define DECLARE(name) extern "C" kernel_function mlak_cuda_##name;
KERNELS(DECLARE)

static kernel_function *find_kernel(const char *name)
{
#define FIND(kernel)                                                                                                   \
    if (strcmp(name, "mlak_cuda_" #kernel) == 0)                                                                       \
        return mlak_cuda_##kernel;
    KERNELS(FIND)
    return NULL;
}

static meeting new_meeting(const char *name, uint32_t number, uint32_t size)
{
    meeting made = {};
    made.size = size;
    made.name = name;
    made.number = number;
    return made;
}

static void start_block(uint32_t index)
{
    gpu.block_index = index;
    memset(gpu.shared, 0xff, gpu.shared_size);
    gpu.block = new_meeting("the block", 0, gpu.threads);
    gpu.late = new_meeting("the others", 0, gpu.threads);
    for (uint32_t i = 1; i < NAMED_BARRIERS; i++)
        gpu.named[i] = new_meeting("named barrier", i, 0);
    hopper_begin();
    for (uint32_t i = 0; i < gpu.threads; i++) {
        gpu.warps[i / WARP] = new_meeting("warp", i / WARP, WARP);
        gpu.groups[i / WARPGROUP] = new_meeting("warpgroup", i / WARPGROUP, WARPGROUP);
        fiber_prepare(&gpu.fibers[i]);
    }
}

bool mlak_emulates(const char *kernel)
{
    return find_kernel(kernel) != NULL;
}

bool mlak_emulate(const char *kernel, unsigned grid, unsigned block, size_t size, const void *job)
{
    kernel_function *found = find_kernel(kernel);
    if (!found)
        return false;
    std::lock_guard<std::mutex> lock(gpu.one_at_a_time);
    if (block == 0 || block > MAX_THREADS || block % WARP)
        fault("a block has 32, 64, ... 1024 threads here");
    gpu.kernel = found;
    gpu.job = (const struct mlak_cuda_job *)job;
    gpu.grid = grid;
    gpu.threads = block;
    gpu.shared_size = size;
    gpu.shared = (unsigned char *)aligned_alloc(1024, (size + 1023) / 1024 * 1024);
    if (!gpu.shared)
        fault("no memory for shared memory");
    for (unsigned i = 0; i < grid; i++) {
        start_block(i);
        run_block();
    }
    free(gpu.shared);
    return true;
}
