/* peer.c - see peer.h. */
#include "peer.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
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

static void answer(const struct arrival *a)
{
    if (a->header.type == MLAP_HELLO) {
        struct mlap_welcome welcome = {.daemon = "peer", .session = a->connection, .max_message = MLAP_MAX_MESSAGE};
        snprintf(welcome.device, sizeof welcome.device, "%s", a->body->hello_.device);
        peer_send(a->socket, MLAP_WELCOME, a->header.sequence, &welcome);
    } else if (a->header.type == MLAP_SUBMIT || a->header.type == MLAP_DECODE) {
        peer_done(a->socket, a->header.sequence);
    } else {
        peer_ok(a->socket, a->header.sequence);
    }
}

static void note(struct peer *peer, char letter)
{
    unsigned at = atomic_fetch_add(&peer->arrivals, 1);
    if (at < sizeof peer->types - 1)
        peer->types[at] = letter;
}

static void serve(struct peer *peer, int socket, union mlap_body *body)
{
    static _Thread_local uint8_t inbox[MLAP_MAX_MESSAGE];
    struct arrival a = {.connection = atomic_fetch_add(&peer->connections, 1) + 1, .body = body, .socket = socket};
    note(peer, '|');
    for (;;) {
        int fds[MLAP_MAX_FDS];
        unsigned n_fds = 0;
        while (atomic_load(&peer->deaf) && !atomic_load(&peer->stopping))
            sleep_ms(1);
        long length = mlap_receive(socket, inbox, sizeof inbox, fds, &n_fds, 0);
        if (length <= 0)
            return;
        struct mlap_fault fault;
        if (mlap_decode(inbox, (size_t)length, &a.header, body, &fault) != MLAP_code_OK ||
            !mlap_fds_fit(a.header.type, n_fds)) {
            fprintf(stderr, "peer: %s %s\n", fault.field, fault.message);
            abort();
        }
        for (unsigned i = 0; i < n_fds; i++)
            close(fds[i]);
        note(peer, mlap_type_name(a.header.type)[0]);
        atomic_fetch_add(&peer->count[a.header.type], 1);
        enum act act = peer->script ? peer->script(peer, &a) : ANSWER;
        if (act == ANSWER)
            answer(&a);
        if (act == HANG_UP)
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
