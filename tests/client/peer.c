/* peer.c - see peer.h. */
#include "peer.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

int64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

void sleep_ms(int ms)
{
    nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L}, NULL);
}

void peer_send(int socket, enum mlap_type type, uint32_t sequence, const void *body)
{
    /* A client that hung up is no fault of the script's. */
    if (mlap_send_message(socket, type, sequence, body, -1, 0) < 0 && errno != EPIPE && errno != ECONNRESET) {
        perror(mlap_type_name(type));
        abort();
    }
}

void peer_error(int socket, uint32_t sequence, enum mlap_code code, const char *field, const char *message)
{
    struct mlap_error error = {.code = code};
    snprintf(error.field, sizeof error.field, "%s", field);
    snprintf(error.message, sizeof error.message, "%s", message);
    peer_send(socket, MLAP_ERROR, sequence, &error);
}

void peer_done(int socket, uint32_t sequence)
{
    struct mlap_done done = {.receive_ns = 1, .queue_ns = 2, .kernel_ns = 3, .kv_tokens = 4};
    peer_send(socket, MLAP_DONE, sequence, &done);
}

void peer_ok(int socket, uint32_t sequence)
{
    struct mlap_ok ok = {0};
    peer_send(socket, MLAP_OK, sequence, &ok);
}

/* ---- rings ---- */

enum { RING_ENTRIES = 8 };

static void close_rings(struct peer *peer)
{
    if (peer->mapping)
        munmap(peer->mapping, mlap_rings_bytes(RING_ENTRIES));
    peer->mapping = NULL;
}

static void open_rings(struct peer *peer, int socket)
{
    const size_t bytes = mlap_rings_bytes(RING_ENTRIES);
    struct mlap_ring_memory memory = {.entries = RING_ENTRIES};
    int fd = memfd_create("rings", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0 || ftruncate(fd, (off_t)bytes) != 0 || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK) != 0)
        abort();
    peer->mapping = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    mlap_rings_init(peer->mapping, RING_ENTRIES);
    if (mlap_rings_open(peer->mapping, bytes, &peer->submission, &peer->completion) != 0)
        abort();
    mlap_ring_set_wakeup(&peer->submission, true);
    if (mlap_send_message(socket, MLAP_RING_MEMORY, 0, &memory, fd, 0) < 0 && errno != EPIPE && errno != ECONNRESET)
        abort();
    close(fd);
}

/* False: no rings, or no room. */
static bool complete(struct peer *peer, const struct arrival *a)
{
    union mlap_entry entry = {.completion = {.sequence = a->header.sequence, .receive_ns = 1, .queue_ns = 2,
                                             .kernel_ns = 3, .kv_tokens = 4}};
    if (!peer->mapping)
        return false;
    atomic_fetch_add(&peer->completed, 1); /* before the client can see it */
    if (mlap_ring_push(&peer->completion, &entry) != 0) {
        atomic_fetch_sub(&peer->completed, 1);
        return false;
    }
    if (mlap_ring_take_wakeup(&peer->completion))
        peer_send(a->socket, MLAP_NEWS, 0, &(struct mlap_news){0});
    return true;
}

static void answer(struct peer *peer, const struct arrival *a)
{
    if (a->header.type == MLAP_HELLO) {
        bool rings = peer->offers_rings && a->body->hello_.features & MLAP_FEATURE_RINGS;
        if (rings)
            open_rings(peer, a->socket);
        struct mlap_welcome welcome = {.daemon = "peer", .session = a->connection, .max_message = MLAP_MAX_MESSAGE,
                                       .features = rings ? MLAP_FEATURE_RINGS : 0};
        snprintf(welcome.device, sizeof welcome.device, "%s", a->body->hello_.device);
        peer_send(a->socket, MLAP_WELCOME, a->header.sequence, &welcome);
    } else if (a->header.type == MLAP_SUBMIT || a->header.type == MLAP_DECODE) {
        if (!complete(peer, a))
            peer_done(a->socket, a->header.sequence);
    } else {
        peer_ok(a->socket, a->header.sequence);
    }
}

static void note(struct peer *peer, char letter)
{
    unsigned at = atomic_load(&peer->arrivals);
    if (at < sizeof peer->types - 1)
        peer->types[at] = letter;
    atomic_store(&peer->arrivals, at + 1);
}

const char *peer_types(struct peer *peer)
{
    atomic_load(&peer->arrivals);
    return peer->types;
}

/* False: hang up. */
static bool handle(struct peer *peer, const struct arrival *a)
{
    note(peer, mlap_type_name(a->header.type)[0]);
    atomic_fetch_add(&peer->count[a->header.type], 1);
    enum act act = peer->script ? peer->script(peer, a) : ANSWER;
    if (act == ANSWER)
        answer(peer, a);
    return act != HANG_UP;
}

/* What the submission ring holds, until deaf; false: hang up. */
static bool serve_ring(struct peer *peer, struct arrival *a, union mlap_body *body)
{
    while (peer->mapping && !atomic_load(&peer->deaf) && mlap_ring_has_news(&peer->submission)) {
        union mlap_entry entry;
        if (mlap_ring_pop(&peer->submission, &entry) != 0)
            abort();
        atomic_fetch_add(&peer->taken, 1);
        a->header = (struct mlap_header){.version = 1, .type = MLAP_SUBMIT, .sequence = entry.submission.sequence};
        body->submit_.plan = entry.submission.plan;
        if (!handle(peer, a))
            return false;
        mlap_ring_set_wakeup(&peer->submission, true);
    }
    return true;
}

static void until_it_hears(struct peer *peer)
{
    while (atomic_load(&peer->deaf) && !atomic_load(&peer->stopping))
        sleep_ms(1);
}

static void serve(struct peer *peer, int socket, union mlap_body *body)
{
    static _Thread_local uint8_t inbox[MLAP_MAX_MESSAGE];
    struct arrival a = {.connection = atomic_fetch_add(&peer->connections, 1) + 1, .body = body, .socket = socket};
    static _Thread_local union mlap_body entry;
    struct arrival of_ring = {.connection = a.connection, .body = &entry, .socket = socket};
    note(peer, '|');
    close_rings(peer);
    for (;;) {
        int fds[MLAP_MAX_FDS];
        unsigned n_fds = 0;
        until_it_hears(peer);
        if (!serve_ring(peer, &of_ring, &entry)) /* the word of it may have been taken before it was deaf */
            return;
        long length = mlap_receive(socket, inbox, sizeof inbox, fds, &n_fds, 0);
        until_it_hears(peer); /* the ring's entries come before the message */
        if (length <= 0 || !serve_ring(peer, &of_ring, &entry))
            return;
        struct mlap_fault fault;
        if (mlap_decode(inbox, (size_t)length, &a.header, body, &fault) != MLAP_code_OK ||
            !mlap_fds_fit(a.header.type, n_fds)) {
            fprintf(stderr, "peer: %s %s\n", fault.field, fault.message);
            abort();
        }
        for (unsigned i = 0; i < n_fds; i++)
            close(fds[i]);
        if (a.header.type == MLAP_KNOCK) {
            atomic_fetch_add(&peer->count[MLAP_KNOCK], 1);
            mlap_ring_set_wakeup(&peer->submission, true);
        } else if (!handle(peer, &a)) {
            return;
        }
        if (!serve_ring(peer, &of_ring, &entry))
            return;
    }
}

static void *run(void *argument)
{
    struct peer *peer = argument;
    union mlap_body *body = malloc(sizeof *body);
    while (body && !atomic_load(&peer->stopping)) {
        int socket = accept(peer->listener, NULL, NULL);
        if (socket < 0)
            break;
        atomic_store(&peer->connection, socket);
        if (!atomic_load(&peer->stopping))
            serve(peer, socket, body);
        atomic_store(&peer->connection, -1);
        close(socket);
    }
    free(body);
    return NULL;
}

struct peer *peer_new(peer_script *script, void *of_test)
{
    struct peer *peer = calloc(1, sizeof *peer);
    assert_non_null(peer);
    peer->script = script;
    peer->offers_rings = getenv("MLA_TEST_RINGS");
    peer->of_test = of_test;
    atomic_store(&peer->connection, -1);
    char folder[] = "/tmp/mla-test-XXXXXX";
    assert_non_null(mkdtemp(folder));
    snprintf(peer->path, sizeof peer->path, "%s/s", folder);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    memcpy(address.sun_path, peer->path, strlen(peer->path) + 1);
    peer->listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    assert_return_code(bind(peer->listener, (struct sockaddr *)&address, sizeof address), errno);
    assert_return_code(listen(peer->listener, 16), errno);
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, run, peer), 0);
    peer->thread = thread;
    return peer;
}

void peer_free(struct peer *peer)
{
    atomic_store(&peer->stopping, true);
    shutdown(peer->listener, SHUT_RDWR);
    int connection = atomic_load(&peer->connection);
    if (connection >= 0)
        shutdown(connection, SHUT_RDWR);
    pthread_join(peer->thread, NULL);
    close_rings(peer);
    close(peer->listener);
    unlink(peer->path);
    *strrchr(peer->path, '/') = 0;
    rmdir(peer->path);
    free(peer);
}

mla_client *client_of(struct peer *peer, int reconnect_ms)
{
    mla_options options;
    mla_options_init(&options);
    options.socket = peer->path;
    options.device = "cpu";
    options.reconnect_ms = reconnect_ms;
    mla_client *client = NULL;
    assert_ok(mla_connect(&client, &options, e));
    return client;
}

mla_batch batch_in(mla_buffer *buffer)
{
    mla_batch batch;
    mla_batch_init(&batch);
    batch.batch = batch.heads = 1;
    batch.q_rows = batch.pages = batch.max_pages = 1;
    batch.softmax_scale = 0.1;
    batch.q = (mla_tensor){buffer, 0};
    batch.kv = (mla_tensor){buffer, 4096};
    batch.block_table = (mla_tensor){buffer, 2048};
    batch.seqlens = (mla_tensor){buffer, 2064};
    batch.out = (mla_tensor){buffer, 1024 * 1024};
    return batch;
}

void rig_init(struct rig *rig, struct peer *peer)
{
    rig->client = client_of(peer, 5000);
    assert_ok(mla_buffer_alloc(rig->client, 2 * 1024 * 1024, &rig->buffer, e));
    rig->batch = batch_in(rig->buffer);
    assert_ok(mla_plan_create(rig->client, &rig->batch, &rig->plan, e));
}

void rig_free(struct rig *rig)
{
    mla_close(rig->client);
}
