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
    fprintf(stderr, "emulator: block %u, thread %u: %s\n", gpu.block.index, gpu.current, what);
    abort();
}

fiber *self()
{
    return &gpu.block.fibers[gpu.current];
}

void mlak_emulate_disorder(uint64_t seed)
{
    std::lock_guard<std::mutex> lock(gpu.one_at_a_time);
    gpu.disorder = seed ? seed * 0x9e3779b97f4a7c15 | 1 : 0;
}

uint32_t draw(uint32_t n)
{
    if (!gpu.disorder)
        return 0;
    gpu.disorder ^= gpu.disorder << 13;
    gpu.disorder ^= gpu.disorder >> 7;
    gpu.disorder ^= gpu.disorder << 17;
    return (uint32_t)(gpu.disorder >> 32) % n;
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
    fiber *own = self();
    own->done = true;
    for (;;)
        switch_to(own, &gpu.scheduler);
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
    fiber->naps = 0;
    fiber->done = false;
    fiber->copies.clear();
    fiber->groups = 0;
    fiber->begun = false;
    fiber->products.clear();
    fiber->at_work.clear();
    fiber->product_groups = 0;
    fiber->acquired.clear();
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
    return !fiber->done && fiber->naps == 0 && (!fiber->waits || fiber->waits->held > fiber->waits_for);
}

/* What everybody waits for, neighbours who wait for the same in one line. */
[[noreturn]] static void fault_deadlock()
{
    const fiber *fibers = gpu.block.fibers;
    for (uint32_t first = 0, next; first < gpu.threads; first = next) {
        const meeting *waits = fibers[first].waits;
        for (next = first + 1; next < gpu.threads && fibers[next].waits == waits; next++)
            ;
        fprintf(stderr, "threads %u to %u: ", first, next - 1);
        if (fibers[first].done)
            fprintf(stderr, "at their end\n");
        else if (!waits)
            fprintf(stderr, "give way\n");
        else
            fprintf(stderr, "wait for %s %u, phase %llu: %u of %u have arrived, %lld bytes to come\n", waits->name,
                    waits->number, (unsigned long long)waits->held, waits->arrived, waits->size,
                    (long long)waits->bytes);
    }
    fault("every thread waits for another one: a barrier that some do not reach");
}

/* In disorder: whether this is a turn that a warp sits out. What its threads wait for may go on meanwhile. */
static bool warp_sits_out(uint32_t first)
{
    thread_block *block = &gpu.block;
    uint32_t group = first / WARPGROUP;
    if (gpu.disorder && first % WARPGROUP == 0 && block->turns++ % 64 == 0)
        block->slow[group] = (draw(2) + draw(2)) * 4;
    for (uint32_t i = first; gpu.disorder && i < first + WARP; i++)
        block->fibers[i].naps -= block->fibers[i].naps > 0;
    return gpu.disorder && draw(8) < block->slow[group];
}

/* The block's threads; a warp goes on as long as it can by itself, in disorder as long as it likes. False: none can. */
static bool threads_go_on()
{
    thread_block *block = &gpu.block;
    bool moved = false;
    uint32_t warps = gpu.threads / WARP, first_warp = draw(warps);
    for (uint32_t w = 0; w < warps; w++) {
        uint32_t first = (first_warp + w) % warps * WARP;
        bool again = true;
        for (uint32_t i = first; i < first + WARP; i++)
            moved |= block->fibers[i].naps > 0 || (gpu.disorder && fiber_can_run(&block->fibers[i]));
        if (warp_sits_out(first))
            continue;
        for (; again; again = again && draw(4) < 3) {
            uint32_t first_lane = draw(WARP);
            again = false;
            for (uint32_t l = 0; l < WARP; l++) {
                uint32_t i = first + (first_lane + l) % WARP;
                fiber *fiber = &block->fibers[i];
                if (!fiber_can_run(fiber))
                    continue;
                fiber->waits = NULL;
                gpu.current = i;
                switch_to(&gpu.scheduler, fiber);
                moved = again = true;
                block->done += fiber->done;
            }
        }
    }
    return moved;
}

/* Who can go on; if nobody can, what is on its way lands; if nothing is, those go on who gave way. */
static bool block_goes_on()
{
    flights_perturb();
    if (threads_go_on() || flights_land())
        return true;
    bool late = gpu.block.late.arrived > 0;
    leave(&gpu.block.late);
    return late;
}

/* All threads of the block to their end. */
static void run_block()
{
    while (gpu.block.done < gpu.threads)
        if (!block_goes_on())
            fault_deadlock();
    block_ended();
}

void await_meeting(meeting *meeting)
{
    fiber *own = self();
    own->waits = meeting;
    own->waits_for = meeting->held;
    switch_to(own, &gpu.scheduler);
}

void perturb()
{
    fiber *own = self();
    if (!gpu.disorder || draw(4) > 0)
        return;
    own->naps = draw(1 + draw(12));
    switch_to(own, &gpu.scheduler);
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
    return &gpu.block.warps[gpu.current / WARP];
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
    return {gpu.block.index};
}
emulated_index emulated_grid()
{
    return {gpu.grid};
}
unsigned char *emulated_shared()
{
    return gpu.block.shared;
}
uint32_t shared_bytes()
{
    return (uint32_t)gpu.shared_size;
}

void __syncthreads()
{
    perturb();
    if (meet(&gpu.block.whole, 0, NULL))
        leave(&gpu.block.whole);
}

const unsigned char *in_shared(const void *pointer)
{
    const unsigned char *at = (const unsigned char *)pointer;
    if (at < gpu.block.shared || at + 16 > gpu.block.shared + gpu.shared_size || (uintptr_t)at % 16)
        fault("16 bytes outside shared memory, or not aligned");
    return at;
}

void copy_async(void *to, const void *from, bool valid)
{
    fiber *own = self();
    in_shared(to);
    if (valid && (uintptr_t)from % 16)
        fault("cp.async from an address that is not aligned");
    memset(to, 0xff, 16); /* until it is waited for, nobody knows what is there */
    own->copies.push_back({to, from, valid, own->groups});
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
    self()->groups++;
}

void emulated_copy_wait(int pending)
{
    fiber *own = self();
    size_t left = 0;
    for (const copy &copy : own->copies) {
        if (copy.group + (uint32_t)pending >= own->groups) {
            own->copies[left++] = copy;
            continue;
        }
        copy_land(&copy);
    }
    own->copies.resize(left);
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

template <float (*DECODE)(uint16_t)> static void multiply_all(product *const *all)
{
    float a[16][16], b[16][8], c[16][8];
    for (uint32_t l = 0; l < WARP; l++)
        for (uint32_t i = 0; i < 4; i++) {
            for (uint32_t half = 0; half < 2; half++) {
                uint32_t row = l / 4 + i % 2 * 8, column = l % 4 * 2 + i / 2 * 8 + half;
                a[row][column] = DECODE((uint16_t)(all[l]->a[i] >> (16 * half)));
                if (i < 2)
                    b[l % 4 * 2 + i * 8 + half][l / 4] = DECODE((uint16_t)(all[l]->b[i] >> (16 * half)));
            }
            c[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2] = all[l]->c[i];
        }
    for (uint32_t row = 0; row < 16; row++)
        for (uint32_t k = 0; k < 16; k++)
            for (uint32_t column = 0; column < 8; column++)
                c[row][column] += a[row][k] * b[k][column];
    for (uint32_t l = 0; l < WARP; l++)
        for (uint32_t i = 0; i < 4; i++)
            all[l]->c[i] = c[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
}

template <float (*DECODE)(uint16_t)>
static void multiply(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    product own = {c, a, {b0, b1}};
    if (!meet(warp(), lane(), &own))
        return;
    multiply_all<DECODE>((product *const *)warp()->arguments);
    leave(warp());
}

void multiply_bf16(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    multiply<mlak_bf16_to_float>(c, a, b0, b1);
}
void multiply_fp16(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    multiply<mlak_fp16_to_float>(c, a, b0, b1);
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
    thread_block *block = &gpu.block;
    block->index = index;
    block->done = 0;
    block->turns = 0;
    memset(block->shared, 0xff, gpu.shared_size);
    block->whole = new_meeting("the block", index, gpu.threads);
    block->late = new_meeting("the others", 0, gpu.threads);
    block->barriers.clear();
    for (uint32_t i = 1; i < NAMED_BARRIERS; i++)
        block->named[i] = new_meeting("named barrier", i, 0);
    for (uint32_t i = 0; i < gpu.threads; i++) {
        block->warps[i / WARP] = new_meeting("warp", i / WARP, WARP);
        block->groups[i / WARPGROUP] = new_meeting("warpgroup", i / WARPGROUP, WARPGROUP);
        fiber_prepare(&block->fibers[i]);
    }
}

void emulate(kernel_function *kernel, uint32_t grid, uint32_t threads, size_t shared_bytes,
             const struct mlak_cuda_job *job)
{
    std::lock_guard<std::mutex> lock(gpu.one_at_a_time);
    if (threads == 0 || threads > MAX_THREADS || threads % WARP)
        fault("a block has 32, 64, ... 1024 threads here");
    gpu.kernel = kernel;
    gpu.job = job;
    gpu.grid = grid;
    gpu.threads = threads;
    gpu.shared_size = shared_bytes;
    gpu.block.shared = (unsigned char *)aligned_alloc(1024, (shared_bytes + 1023) / 1024 * 1024);
    if (!gpu.block.shared)
        fault("no memory for shared memory");
    for (uint32_t i = 0; i < grid; i++) {
        start_block(i);
        run_block();
    }
    free(gpu.block.shared);
}

bool mlak_emulates(const char *kernel)
{
    return find_kernel(kernel) != NULL;
}

bool mlak_emulate(const char *kernel, unsigned grid, unsigned block, size_t size, const void *job)
{
    kernel_function *found = find_kernel(kernel);
    if (found)
        emulate(found, grid, block, size, (const struct mlak_cuda_job *)job);
    return found != NULL;
}
