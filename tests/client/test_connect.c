/* test_connect.c - what a program sees when it cannot be connected, and how the device is chosen. */
#include "peer.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static mla_options options_for(const char *socket, int reconnect_ms)
{
    mla_options options;
    mla_options_init(&options);
    options.socket = socket;
    options.device = "cpu";
    options.reconnect_ms = reconnect_ms;
    return options;
}

static void absent_socket_names_path(void **state)
{
    (void)state;
    mla_client *client = (mla_client *)&client;
    mla_options options = options_for("/tmp/mla-test-no-such-daemon", 50);
    int64_t start = now_ms();
    assert_fails(MLA_NOT_CONNECTED, "options.socket", "/tmp/mla-test-no-such-daemon",
                 mla_connect(&client, &options, e));
    assert_in_range(now_ms() - start, 45, 1000);
    assert_ptr_equal(client, &client);     /* untouched */
}

static void socket_that_may_not_be_opened(void **state)
{
    (void)state;
    if (geteuid() != 0)
        skip();     /* only root can become somebody else */
    struct peer *peer = peer_new(NULL, NULL);
    assert_int_equal(chmod(peer->path, 0600), 0);
    assert_int_equal(seteuid(65534), 0);
    mla_client *client;
    mla_options options = options_for(peer->path, 20000);
    int64_t start = now_ms();
    assert_fails(MLA_DENIED, "options.socket", peer->path, mla_connect(&client, &options, e));
    assert_in_range(now_ms() - start, 0, 5000);     /* at once, not after reconnect_ms */
    assert_int_equal(seteuid(0), 0);
    peer_free(peer);
}

static void options_are_checked(void **state)
{
    (void)state;
    mla_client *client;
    mla_options options = {0};
    assert_fails(MLA_INVALID, "options.struct_size", "mla_options_init", mla_connect(&client, &options, e));
    options = options_for("x", -1);
    assert_fails(MLA_INVALID, "options.reconnect_ms", "-1", mla_connect(&client, &options, e));
    char longest[200];
    memset(longest, 'x', sizeof longest);
    longest[199] = 0;
    options = options_for(longest, 0);
    assert_fails(MLA_INVALID, "options.socket", "107 bytes", mla_connect(&client, &options, e));
    options = options_for("x", 0);
    options.device = longest;
    assert_fails(MLA_INVALID, "options.device", "63 bytes", mla_connect(&client, &options, e));
    options.device = "\xff";
    assert_fails(MLA_INVALID, "options.device", "UTF-8", mla_connect(&client, &options, e));
    options = options_for("x", 0);
    options.name = "";
    assert_fails(MLA_INVALID, "options.name", "1 to 63", mla_connect(&client, &options, e));
    options.name = "\xff";
    assert_fails(MLA_INVALID, "options.name", "UTF-8", mla_connect(&client, &options, e));
    assert_fails(MLA_INVALID, "client", "NULL", mla_connect(NULL, NULL, e));
    assert_int_equal(mla_connect(NULL, NULL, NULL), MLA_INVALID);
}

struct refusal { enum mlap_code code; uint32_t sequence; unsigned times; };

static enum act refuse(struct peer *peer, const struct arrival *a)
{
    struct refusal *refusal = peer->of_test;
    if (a->connection > refusal->times)
        return ANSWER;
    peer_error(a->socket, refusal->sequence, refusal->code, "device", "says the peer");
    return HANG_UP;
}

static void refused(enum mlap_code code, uint32_t sequence, mla_status status)
{
    struct refusal refusal = {.code = code, .sequence = sequence, .times = 1000};
    struct peer *peer = peer_new(refuse, &refusal);
    mla_client *client;
    mla_options options = options_for(peer->path, 10000);
    assert_fails(status, "device", "says the peer", mla_connect(&client, &options, e));
    assert_int_equal(peer->connections, 1);
    peer_free(peer);
}

static void refusals_are_reported_at_once(void **state)
{
    (void)state;
    refused(MLAP_code_DENIED, 1, MLA_DENIED);
    refused(MLAP_code_NO_DEVICE, 1, MLA_NO_DEVICE);
    refused(MLAP_code_QUOTA, 1, MLA_QUOTA);
    refused(MLAP_code_DRAINING, 1, MLA_DRAINING);
    refused(MLAP_code_VERSION, 0, MLA_VERSION);
}

static void unavailable_is_retried(void **state)
{
    (void)state;
    struct refusal refusal = {.code = MLAP_code_UNAVAILABLE, .sequence = 1, .times = 4};
    struct peer *peer = peer_new(refuse, &refusal);
    mla_client *client = client_of(peer, 5000);
    assert_int_equal(peer->connections, 5);
    assert_string_equal(mla_device(client), "cpu");
    mla_close(client);
    refusal.times = 1000;
    mla_options options = options_for(peer->path, 30);
    assert_fails(MLA_UNAVAILABLE, "device", "says the peer", mla_connect(&client, &options, e));
    peer_free(peer);
}

static enum act other_version(struct peer *peer, const struct arrival *a)
{
    (void)peer;
    static const uint8_t bytes[] = {0x94, 2, 2, 1, 0x80};     /* [2, WELCOME, 1, {}] */
    assert_int_equal(mlap_send(a->socket, bytes, sizeof bytes, -1, 0), 0);
    return HANDLED;
}

static enum act nonsense(struct peer *peer, const struct arrival *a)
{
    (void)peer;
    assert_int_equal(mlap_send(a->socket, "hello", 5, -1, 0), 0);
    return HANDLED;
}

static void daemon_of_other_version(void **state)
{
    (void)state;
    mla_client *client;
    struct peer *peer = peer_new(other_version, NULL);
    mla_options options = options_for(peer->path, 5000);
    assert_fails(MLA_VERSION, "", "broke the protocol", mla_connect(&client, &options, e));
    peer_free(peer);
    peer = peer_new(nonsense, NULL);
    options = options_for(peer->path, 5000);
    assert_fails(MLA_MALFORMED, "", "broke the protocol", mla_connect(&client, &options, e));
    peer_free(peer);
}

static enum act serves(struct peer *peer, const struct arrival *a)
{
    if (a->header.type == MLAP_HELLO)
        assert_int_equal(mlap_has(&a->body->hello_, hello, device), a->connection > 1);
    if (a->header.type != MLAP_STATUS)
        return ANSWER;
    struct mlap_status_reply *reply = calloc(1, sizeof *reply);
    strcpy(reply->daemon, "peer");
    const char *const *names = peer->of_test;
    for (; *names; names++) {
        struct mlap_device *device = &reply->devices[reply->n_devices++];
        strcpy(device->name, *names);
        device->state = **names == '-' ? MLAP_device_state_ABSENT : MLAP_device_state_READY;
    }
    peer_send(a->socket, MLAP_STATUS_REPLY, a->header.sequence, reply);
    free(reply);
    return HANDLED;
}

static void first_device_that_is_no_oracle(void **state)
{
    (void)state;
    unsetenv("MLAD_DEVICE");
    const char *served[] = {"reference", "-absent", "gpu-1", "cpu", NULL};
    struct peer *peer = peer_new(serves, served);
    mla_options options = options_for(peer->path, 2000);
    options.device = NULL;
    mla_client *client;
    assert_ok(mla_connect(&client, &options, e));
    assert_string_equal(mla_device(client), "gpu-1");
    mla_close(client);
    served[1] = NULL;
    atomic_store(&peer->connections, 0);
    assert_fails(MLA_NO_DEVICE, "options.device", "reference", mla_connect(&client, &options, e));
    peer_free(peer);
}

static void environment_names_socket_and_device(void **state)
{
    (void)state;
    struct peer *peer = peer_new(NULL, NULL);
    setenv("MLAD_SOCKET", peer->path, 1);
    setenv("MLAD_DEVICE", "reference", 1);
    mla_client *client;
    assert_ok(mla_connect(&client, NULL, e));
    assert_string_equal(mla_device(client), "reference");
    mla_close(client);
    unsetenv("MLAD_SOCKET");
    unsetenv("MLAD_DEVICE");
    peer_free(peer);
}

static enum act silent(struct peer *peer, const struct arrival *a)
{
    (void)peer, (void)a;
    return HANDLED;
}

static void silent_daemon_times_out(void **state)
{
    (void)state;
    struct peer *peer = peer_new(silent, NULL);
    mla_client *client;
    mla_options options = options_for(peer->path, 0);
    int64_t start = now_ms();
    assert_fails(MLA_TIMEOUT, "", "did not answer", mla_connect(&client, &options, e));
    assert_in_range(now_ms() - start, 900, 4000);
    peer_free(peer);
}

static void version_is_that_of_the_header(void **state)
{
    (void)state;
    char text[32];
    snprintf(text, sizeof text, "%d.%d.%d", MLA_VERSION_MAJOR, MLA_VERSION_MINOR, MLA_VERSION_PATCH);
    assert_string_equal(mla_version(), text);
    assert_string_equal(mla_status_text(MLA_BUSY), "busy");
    assert_string_equal(mla_status_text((mla_status)-1), "unknown");
    assert_string_equal(mla_status_text((mla_status)31), "unknown");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(absent_socket_names_path),
        cmocka_unit_test(socket_that_may_not_be_opened),
        cmocka_unit_test(options_are_checked),
        cmocka_unit_test(refusals_are_reported_at_once),
        cmocka_unit_test(unavailable_is_retried),
        cmocka_unit_test(daemon_of_other_version),
        cmocka_unit_test(first_device_that_is_no_oracle),
        cmocka_unit_test(environment_names_socket_and_device),
        cmocka_unit_test(silent_daemon_times_out),
        cmocka_unit_test(version_is_that_of_the_header),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
