/* client.c - the client: options, birth and death, the lock. The caller owns it from mla_connect to mla_close. */
#include "mlac.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define DEFAULT_SOCKET "/run/mlad/mlad.sock"
enum { DEFAULT_RECONNECT_MS = 30000 };

MLA_API void mla_options_init(mla_options *options)
{
    *options = (mla_options){.struct_size = sizeof *options, .reconnect_ms = DEFAULT_RECONNECT_MS};
}

/* What the caller said, else what the environment says, else `otherwise`. */
static const char *choose(const char *said, const char *variable, const char *otherwise)
{
    const char *value = said ? said : secure_getenv(variable);
    return value && (said || *value) ? value : otherwise;
}

static mla_status take_text(char *to, size_t size, const char *text, const char *field, const char *what,
                            mla_error *error)
{
    size_t length = strlen(text);
    if (length == 0 || length >= size)
        return mlac_fail(error, MLA_INVALID, field, "%s must have 1 to %zu bytes, not %zu", what, size - 1, length);
    memcpy(to, text, length + 1);
    return MLA_OK;
}

static mla_status check_utf8(const mla_client *client, mla_error *error)
{
    struct mlap_hello hello;
    uint8_t bytes[512];
    mlac_hello(client, &hello);
    if (mlap_encode(bytes, sizeof bytes, MLAP_HELLO, 1, &hello) > 0)
        return MLA_OK;
    hello.present = 0;
    bool device = mlap_encode(bytes, sizeof bytes, MLAP_HELLO, 1, &hello) > 0;
    return mlac_fail(error, MLA_INVALID, device ? "options.device" : "options.name", "it must be valid UTF-8");
}

/* Whether the rings are to be left alone. */
static mla_status choose_transport(mla_client *client, mla_transport transport, mla_error *error)
{
    const char *said = choose(NULL, "MLAD_TRANSPORT", "rings");
    if (transport == MLA_TRANSPORT_AUTO && strcmp(said, "socket") != 0 && strcmp(said, "rings") != 0)
        return mlac_fail(error, MLA_INVALID, "options.transport", "$MLAD_TRANSPORT must be rings or socket");
    if (transport != MLA_TRANSPORT_AUTO && transport != MLA_TRANSPORT_SOCKET && transport != MLA_TRANSPORT_RINGS)
        return mlac_fail(error, MLA_INVALID, "options.transport", "it must be a mla_transport, not %d", (int)transport);
    client->socket_only = transport == MLA_TRANSPORT_SOCKET ||
                          (transport == MLA_TRANSPORT_AUTO && strcmp(said, "socket") == 0);
    return MLA_OK;
}

static mla_status configure(mla_client *client, const mla_options *options, mla_error *error)
{
    if (options->struct_size != sizeof *options)
        return mlac_fail(error, MLA_INVALID, "options.struct_size", "it is %zu and this library's is %zu; call "
                         "mla_options_init first", options->struct_size, sizeof *options);
    if (options->reconnect_ms < 0)
        return mlac_fail(error, MLA_INVALID, "options.reconnect_ms", "it must be 0 or more milliseconds, not %d",
                         options->reconnect_ms);
    if (options->high_priority != 0 && options->high_priority != 1)
        return mlac_fail(error, MLA_INVALID, "options.high_priority", "it must be 0 or 1, not %d",
                         options->high_priority);
    client->high_priority = options->high_priority == 1;
    client->reconnect_ns = options->reconnect_ms * MLAC_MS;
    client->address.sun_family = AF_UNIX;
    const char *socket = choose(options->socket, "MLAD_SOCKET", DEFAULT_SOCKET);
    const char *device = choose(options->device, "MLAD_DEVICE", NULL);
    char name[64];
    snprintf(name, sizeof name, "%s", *program_invocation_short_name ? program_invocation_short_name : "unnamed");
    for (char *c = name; *c; c++)
        *c = (char)(*c < ' ' || *c > '~' ? '?' : *c);
    mla_status status = take_text(client->address.sun_path, sizeof client->address.sun_path, socket, "options.socket",
                                  "the socket's path", error);
    if (status == MLA_OK && device)
        status = take_text(client->device, sizeof client->device, device, "options.device", "the device's name", error);
    if (status == MLA_OK)
        status = take_text(client->name, sizeof client->name, options->name ? options->name : name, "options.name",
                           "the client's name", error);
    if (status == MLA_OK)
        status = choose_transport(client, options->transport, error);
    return status == MLA_OK ? check_utf8(client, error) : status;
}

static mla_status greet(mla_client *client, mla_error *error)
{
    struct mlap_hello hello;
    mlac_hello(client, &hello);
    struct mlac_call *call = mlac_call_new(mlac_next_id(client), MLAP_HELLO, &hello, error);
    if (!call)
        return MLA_MEMORY;
    mlac_call_start(client, call);
    mlac_await(client, call->id, MLAC_COMPLETE, MLAC_NEVER);
    mla_status status = mlac_report(error, &call->error);
    mlac_call_free(client, call);
    return status;
}

MLA_API mla_status mla_connect(mla_client **client_out, const mla_options *options, mla_error *error)
{
    if (!client_out)
        return mlac_fail(error, MLA_INVALID, "client", "it must not be NULL");
    mla_options defaults;
    mla_options_init(&defaults);
    mla_client *client = calloc(1, sizeof *client);
    if (!client)
        return mlac_fail(error, MLA_MEMORY, "", "out of memory in this process");
    pthread_mutex_init(&client->lock, NULL);
    TAILQ_INIT(&client->calls);
    TAILQ_INIT(&client->outbox);
    TAILQ_INIT(&client->sleepers);
    client->socket = client->epoll = client->timer = client->watched = client->ring_memory = -1;
    client->alarm = MLAC_NEVER;
    client->random = (uint64_t)mlac_now() ^ (uint64_t)getpid() << 32;
    mlac_settled(client);

    mla_status status = configure(client, options ? options : &defaults, error);
    if (status == MLA_OK) {
        mlac_placement_look(client);
        mlac_lock(client);
        status = greet(client, error);
        mlac_unlock(client);
    }
    if (status != MLA_OK) {
        mla_close(client);
        return status;
    }
    *client_out = client;
    return MLA_OK;
}

MLA_API void mla_close(mla_client *client)
{
    if (!client)
        return;
    mlac_streams_close(client);
    client->link = MLAC_DEAD;           /* nothing is sent any more; the daemon cleans up at the end of file */
    struct mlac_call *call;
    while ((call = TAILQ_LAST(&client->calls, mlac_calls))) {   /* users before what they use */
        mla_buffer *buffer = mlac_registers(call) ? call->buffer : NULL;
        mla_plan *plan = call->type == MLAP_PLAN ? call->plan : NULL;
        mla_step *step = call->type == MLAP_STEP ? call->step : NULL;
        mlac_call_free(client, call);
        if (buffer) {
            buffer->call = NULL;
            mlac_buffer_destroy(buffer);
        }
        if (plan) {
            free(plan->drop);
            free(plan);
        }
        if (step) {
            free(step->drop);
            free(step->plans);
            free(step);
        }
    }
    mlac_rings_close(client);
    for (size_t i = 0; i < 3; i++) {
        int fd = (int[]){client->socket, client->epoll, client->timer}[i];
        if (fd >= 0)
            close(fd);
    }
    pthread_mutex_destroy(&client->lock);
    free(client);
}

MLA_API const char *mla_device(const mla_client *client)
{
    return client->device;
}

MLA_API mla_transport mla_transport_used(mla_client *client)
{
    mlac_lock(client);
    bool rings = client->rings;
    mlac_unlock(client);
    return rings ? MLA_TRANSPORT_RINGS : MLA_TRANSPORT_SOCKET;
}

void mlac_lock(struct mla_client *client)
{
    pthread_mutex_lock(&client->lock);
}

void mlac_unlock(struct mla_client *client)
{
    mlac_fd_update(client);
    pthread_mutex_unlock(&client->lock);
}
