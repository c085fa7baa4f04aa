/* Rings: whatever a client writes into their memory, and when, goes through the worker's session code; beside it
 * another client's decodes and rounds stay right, and when it has gone nothing of it is left.
 *
 * The device is the cpu's, with lanes for steps that run nothing: how a round ends is said by its number.
 *
 * An input is a row of steps, each a byte that chooses it and the bytes that it takes. */
#include "fuzz.h"
#include "log.h"
#include "session.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MEMORY = 16384, Q = 0, KV = 4096, TABLE = 2048, LENGTHS = 2064, OUT = 8192, STEPS = 256, PATIENCE = 1000000 };
enum { SLOT = 128, ROOM = 2, LINGERS = 3 /* polls */ };
/* How rounds end, by their number modulo ROUNDS. */
enum { ROUND_RUNS, ROUND_STOPS, ROUND_LINGERS, ROUND_FAILS, ROUND_IS_REFUSED, ROUND_FITS_NOWHERE, ROUNDS };

/* A client's end of a session. */
struct side {
    int socket;
    void *mapping;
    struct mlap_ring submission, completion;
    uint16_t *memory; /* q, kv, tables and out, registered */
};

static struct mlad_sessions sessions;
static struct mlad_scheduler scheduler;
static struct mlad_quota quota;
static struct mlad_stats stats;
static struct mlad_life life;
static uv_loop_t loop;
static struct side neighbour;
static uint8_t inbox[MLAP_MAX_MESSAGE];
static union mlap_body body;

static void require(int condition)
{
    if (!condition)
        abort();
}

/* ---- a device with lanes ---- */

struct mlak_lane { uint32_t in_flight; bool stopped, abandoned; };
struct mlak_order { struct mlak_lane *lane; uint32_t rounds[ROOM], first, flying, polls; };

static enum mlak_code import(struct mlak_device *device, const struct mlak_memory *memory,
                             struct mlak_mapping *mapping, struct mlak_fault *fault)
{
    static _Alignas(SLOT) char flags[SLOT]; /* nobody looks at them */
    (void)device, (void)fault;
    require(memory->kind == MLAK_MEMORY_HOST || memory->bytes <= sizeof flags);
    mapping->pointer = memory->kind == MLAK_MEMORY_HOST ? (char *)memory->host : flags;
    return MLAK_OK;
}

static struct mlak_lane *lane_new(struct mlak_device *device, struct mlak_fault *fault)
{
    (void)device, (void)fault;
    return calloc(1, sizeof(struct mlak_lane));
}

static void lane_abandon(struct mlak_device *device, struct mlak_lane *lane)
{
    (void)device;
    lane->abandoned = true;
}

static enum mlak_code lane_restart(struct mlak_device *device, struct mlak_lane *lane, struct mlak_fault *fault)
{
    (void)device, (void)fault;
    require(lane->stopped && lane->in_flight == 0 && !lane->abandoned);
    lane->stopped = false;
    return MLAK_OK;
}

static void lane_free(struct mlak_device *device, struct mlak_lane *lane)
{
    (void)device;
    require(lane->in_flight == 0);
    free(lane);
}

static struct mlak_order *order_new(struct mlak_device *device, struct mlak_lane *lane,
                                    const struct mlak_batch *const *batches, const struct mlak_flags *flags,
                                    uint32_t count, uint32_t wait_ms, struct mlak_fault *fault)
{
    (void)device, (void)batches, (void)flags, (void)wait_ms, (void)fault;
    struct mlak_order *order = calloc(1, sizeof *order);
    require(order && count == 1);
    order->lane = lane;
    return order;
}

static bool order_room(struct mlak_device *device, struct mlak_order *order)
{
    (void)device;
    return order->flying < ROOM;
}

static enum mlak_code order_launch(struct mlak_device *device, struct mlak_order *order, uint32_t round,
                                   struct mlak_fault *fault)
{
    (void)device;
    require(order->flying < ROOM && !order->lane->abandoned);
    if (round % ROUNDS == ROUND_FITS_NOWHERE)
        return mlak_fail(fault, MLAK_MEMORY, "", "no room");
    order->rounds[(order->first + order->flying++) % ROOM] = round;
    order->lane->in_flight++;
    return MLAK_OK;
}

static enum mlak_code order_poll(struct mlak_device *device, struct mlak_order *order, bool *ended,
                                 struct mlak_order_outcome *outcome, struct mlak_fault *fault)
{
    (void)device, (void)fault;
    struct mlak_lane *lane = order->lane;
    require(order->flying > 0);
    const uint32_t round = order->rounds[order->first], way = round % ROUNDS;
    lane->stopped |= way == ROUND_STOPS || lane->abandoned;
    *ended = lane->stopped || way != ROUND_LINGERS || ++order->polls == LINGERS;
    if (!*ended)
        return MLAK_OK;
    static const struct mlak_layer_time times[] = {{1000, UINT64_MAX}};
    *outcome = (struct mlak_order_outcome){
        .round = round, .stopped = lane->stopped, .n_times = !lane->stopped, .times = times};
    if (way == ROUND_FAILS || way == ROUND_IS_REFUSED) {
        outcome->failed = 1;
        outcome->code = way == ROUND_FAILS ? MLAK_REQUESTS : MLAK_BATCH;
        mlak_fail(&outcome->fault, outcome->code, "layers[0]", "as its number says");
    }
    order->polls = 0;
    order->first = (order->first + 1) % ROOM;
    order->flying--;
    lane->in_flight--;
    return MLAK_OK;
}

static void order_free(struct mlak_device *device, struct mlak_order *order)
{
    (void)device;
    require(order->flying == 0);
    free(order);
}

/* ---- the worker ---- */

static void on_idle(struct mlad_scheduler *idle)
{
    (void)idle;
}

static void on_lost(struct mlad_scheduler *lost, const char *why)
{
    (void)lost, (void)why;
    abort();
}

static void turn(void)
{
    mlad_rings_look(&sessions);
    mlad_scheduler_run(&scheduler);
    uv_run(&loop, UV_RUN_NOWAIT);
}

/* The type of the next datagram, decoded into `body`, or 0. */
static uint32_t receive(int socket, int *fd)
{
    int fds[MLAP_MAX_FDS];
    unsigned n_fds = 0;
    struct mlap_header header;
    long length = mlap_receive(socket, inbox, sizeof inbox, fds, &n_fds, MSG_DONTWAIT);
    if (length <= 0)
        return 0;
    require(mlap_decode(inbox, (size_t)length, &header, &body, NULL) == MLAP_code_OK);
    require(mlap_fds_fit(header.type, n_fds));
    if (n_fds)
        *fd = fds[0];
    return header.type;
}

static void ask(struct side *side, enum mlap_type type, const void *what, int fd)
{
    uint32_t answer = 0;
    require(mlap_send_message(side->socket, type, 1, what, fd, 0) == 0);
    for (int i = 0; i < PATIENCE && !answer; i++, turn())
        answer = receive(side->socket, NULL);
    require(answer == MLAP_OK);
}

static void attach(struct side *side, uint64_t number)
{
    static struct mlap_attach message = {.pid = 1, .hello_seq = 1, .hello = {.client = "fuzz"}};
    const size_t bytes = mlap_rings_bytes(MLAD_RING_ENTRIES);
    int ends[2], fd = -1;
    require(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) == 0);
    message.session = number;
    message.uid = number == 1; /* a quota of its own for the neighbour */
    message.hello.features = MLAP_FEATURE_RINGS;
    mlap_set(&message.hello, hello, features);
    mlad_session_open(&sessions, &message, ends[1]);
    side->socket = ends[0];
    require(receive(side->socket, &fd) == MLAP_RING_MEMORY && body.ring_memory_.entries == MLAD_RING_ENTRIES);
    require(receive(side->socket, NULL) == MLAP_WELCOME && body.welcome_.features == MLAP_FEATURE_RINGS);
    side->mapping = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    require(side->mapping != MAP_FAILED &&
            mlap_rings_open(side->mapping, bytes, &side->submission, &side->completion) == 0);
    close(fd);

    fd = memfd_create("fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    require(fd >= 0 && ftruncate(fd, MEMORY) == 0 && fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK) == 0);
    side->memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    require(side->memory != MAP_FAILED);
    *(int32_t *)(void *)&side->memory[LENGTHS / 2] = 1;
    ask(side, MLAP_REGISTER, &(struct mlap_register){.buffer = 1, .bytes = MEMORY}, fd);
    close(fd);
    ask(side, MLAP_PLAN, &(struct mlap_plan){.plan = 1, .batch = {
        .batch = 1, .heads = 1, .q_rows = 1, .pages = 1, .page_size = 1, .max_pages = 1, .softmax_scale = 1,
        .q = {.buffer = 1, .offset = Q}, .kv = {.buffer = 1, .offset = KV},
        .block_table = {.buffer = 1, .offset = TABLE}, .seqlens = {.buffer = 1, .offset = LENGTHS},
        .out = {.buffer = 1, .offset = OUT}}}, -1);
    static struct mlap_import flags = {.buffer = 2, .gpu = "GPU", .bytes = SLOT, .access = MLAP_access_READWRITE};
    memset(flags.handle, '0', sizeof flags.handle - 1);
    mlap_set(&flags, import, access);
    ask(side, MLAP_IMPORT, &flags, -1);
    static const struct mlap_step step = {.step = 1, .slots = {.buffer = 2}, .n_layers = 1, .layers = {{.plan = 1}}};
    ask(side, MLAP_STEP, &step, -1);
}

static void detach(struct side *side)
{
    munmap(side->mapping, mlap_rings_bytes(MLAD_RING_ENTRIES));
    munmap(side->memory, MEMORY);
    close(side->socket);
}

static bool alone(void)
{
    const struct mlad_session *first = TAILQ_FIRST(&sessions.all);
    return first && first->id == 1 && !TAILQ_NEXT(first, entry);
}

static void start(void)
{
    static struct mlak_backend backend;
    struct mlak_fault fault;
    backend = *mlak_backend("cpu");
    struct mlak_device *device =
        backend.open(&(struct mlak_options){.threads = 1, .device = "cpu", .variant = "generic"}, &fault);
    backend.import = import;
    backend.lane_new = lane_new;
    backend.lane_abandon = lane_abandon;
    backend.lane_restart = lane_restart;
    backend.lane_free = lane_free;
    backend.order_new = order_new;
    backend.order_room = order_room;
    backend.order_launch = order_launch;
    backend.order_poll = order_poll;
    backend.order_free = order_free;
    size_t count;
    stats.life = &life;
    quota.limits = (struct mlad_limits){.max_sessions = 4,
                                        .max_buffers = 16,
                                        .max_plans = 16,
                                        .max_in_flight = 4,
                                        .max_bytes = 1 << 20,
                                        .max_in_flight_per_session = 4,
                                        .max_bytes_per_session = 1 << 20};
    scheduler.queue_limit = 64;
    require(device && uv_loop_init(&loop) == 0 &&
            mlad_scheduler_start(&scheduler, &loop, &backend, device, &stats, on_idle, on_lost));
    sessions = (struct mlad_sessions){.loop = &loop, .device = "cpu", .scheduler = &scheduler, .quota = &quota,
                                      .stats = &stats};
    sessions.capabilities.rows = backend.capabilities(device, &count);
    sessions.capabilities.count = count;
    TAILQ_INIT(&sessions.all);
    attach(&neighbour, 1);
}

/* The neighbour's next completion is that of the entry. */
static void neighbour_completes(const union mlap_entry *entry)
{
    union mlap_entry completion;
    require(mlap_ring_push(&neighbour.submission, entry) == 0);
    for (int i = 0; i < PATIENCE && !mlap_ring_has_news(&neighbour.completion); i++)
        turn();
    require(mlap_ring_pop(&neighbour.completion, &completion) == 0);
    require(completion.completion.sequence == entry->submission.sequence && completion.completion.failed == 0);
}

/* The neighbour's decode: the value of its only key. And a round of its step. */
static void neighbour_is_right(void)
{
    static uint32_t sequence;
    union mlap_entry entry = {.submission = {
        .operation = MLAP_OPERATION_SUBMIT, .sequence = ++sequence ? sequence : ++sequence, .plan = 1}};
    for (int i = 0; i < 576; i++)
        neighbour.memory[KV / 2 + i] = (uint16_t)(0x3f80 + (sequence + (uint32_t)i) % 64);
    neighbour_completes(&entry);
    entry.submission.operation = MLAP_OPERATION_ARM;
    entry.submission.round = ROUND_RUNS;
    neighbour_completes(&entry);
    require(memcmp(&neighbour.memory[OUT / 2], &neighbour.memory[KV / 2], 1024) == 0);
}

struct input { const uint8_t *data; size_t size; };

static void take(struct input *input, void *to, size_t bytes)
{
    size_t have = bytes < input->size ? bytes : input->size;
    memset(to, 0, bytes);
    memcpy(to, input->data, have);
    input->data += have;
    input->size -= have;
}

static void step(struct side *side, struct input *input)
{
    uint8_t which, round;
    uint16_t at;
    uint32_t value;
    union mlap_entry entry = {.submission = {.operation = MLAP_OPERATION_SUBMIT, .sequence = 1, .plan = 1}};
    struct mlap_submit submit = {.plan = 1};
    struct mlap_arm arm = {.step = 1};
    take(input, &which, sizeof which);
    switch (which % 11) {
    case 0: /* any word of the memory */
        take(input, &at, sizeof at);
        take(input, &value, sizeof value);
        memcpy((char *)side->mapping + at * 4u % mlap_rings_bytes(MLAD_RING_ENTRIES), &value, sizeof value);
        break;
    case 1: take(input, &entry, sizeof entry); mlap_ring_push(&side->submission, &entry); break;
    case 2: mlap_ring_push(&side->submission, &entry); break;
    case 3: mlad_rings_look(&sessions); break;
    case 4: mlad_rings_ask(&sessions); break;
    case 5: turn(); break;
    case 6: mlap_send_message(side->socket, MLAP_KNOCK, 0, &(struct mlap_knock){0}, -1, MSG_DONTWAIT); break;
    case 7: mlap_send_message(side->socket, MLAP_SUBMIT, 2, &submit, -1, MSG_DONTWAIT); break;
    case 8:
        take(input, &round, sizeof round);
        entry.submission.operation = MLAP_OPERATION_ARM;
        entry.submission.round = round;
        mlap_ring_push(&side->submission, &entry);
        break;
    case 9:
        take(input, &round, sizeof round);
        arm.round = round;
        mlap_send_message(side->socket, MLAP_ARM, 3, &arm, -1, MSG_DONTWAIT);
        break;
    case 10:
        mlap_send_message(side->socket, MLAP_STEP_DROP, 4, &(struct mlap_step_drop){.step = 1}, -1, MSG_DONTWAIT);
        break;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static uint64_t number = 1;
    struct input input = {data, size};
    struct side side;
    if (number == 1) {
        mlad_log_open(MLAD_LOG_STDERR, LOG_EMERG);
        start();
    }
    attach(&side, ++number);
    for (int i = 0; i < STEPS && input.size; i++)
        step(&side, &input);
    turn();
    neighbour_is_right();
    detach(&side);
    for (int i = 0; i < PATIENCE && !alone(); i++)
        turn();
    const struct mlad_user *user = quota.users;
    require(alone() && !user->next && user->sessions == 1 && user->in_flight == 0 && user->buffers == 2);
    return 0;
}
