/* test_policy.c - who may connect, asked of real connections by processes of other users (as root; else of our own). */
#include "../proto/cmocka_all.h"

#include "policy.h"

#include <errno.h>
#include <grp.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

enum { ALICE = 61001, ALICES_GROUP = 61002, TEAM = 61003, OTHERS = 61004 };

static struct mlad_config config;

/* A connection from a child that runs as ALICE with the supplementary group TEAM; the child ends with the pipe. */
struct visitor {
    int connection, end;
    pid_t pid;
};

static void visit(const struct sockaddr_un *address, int hold)
{
    const gid_t groups[] = {TEAM};
    char byte;
    int fd = socket(AF_UNIX, SOCK_SEQPACKET, 0);
    prctl(PR_SET_PDEATHSIG, 9);
    if (setgroups(1, groups) == 0 && setgid(ALICES_GROUP) == 0 && setuid(ALICE) == 0 &&
        connect(fd, (const struct sockaddr *)address, sizeof *address) == 0)
        (void)!read(hold, &byte, 1);
    _exit(0);
}

static struct visitor visitor_new(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path + 1, sizeof address.sun_path - 1, "mlad-test-policy-%d", getpid());
    int listener = socket(AF_UNIX, SOCK_SEQPACKET, 0), hold[2];
    assert_int_equal(bind(listener, (struct sockaddr *)&address, sizeof address), 0);
    assert_int_equal(listen(listener, 1), 0);
    assert_int_equal(pipe(hold), 0);
    pid_t pid = fork();
    if (pid == 0) {
        close(hold[1]);
        visit(&address, hold[0]);
    }
    close(hold[0]);
    struct visitor visitor = {.connection = accept(listener, NULL, NULL), .end = hold[1], .pid = pid};
    assert_true(visitor.connection >= 0);
    close(listener);
    return visitor;
}

static void visitor_free(struct visitor *visitor)
{
    close(visitor->connection);
    close(visitor->end);
    waitpid(visitor->pid, NULL, 0);
}

static void configure(const char *text)
{
    char error[MLAD_CONFIG_ERROR];
    assert_true(mlad_config_load(&config, NULL, false, NULL, 0, error));
    assert_true(mlad_config_parse(&config, text, strlen(text), "test", error));
}

static void assert_verdict(const struct visitor *visitor, const char *text, bool allowed, bool admin)
{
    struct mlad_identity identity;
    configure(text);
    assert_true(mlad_policy_identify(visitor->connection, &identity));
    if (mlad_policy_allows(&config, &identity, visitor->connection) != allowed)
        fail_msg("'%s' should%s let the user in", text, allowed ? "" : " not");
    if (mlad_policy_is_admin(&config, &identity) != admin)
        fail_msg("'%s' should%s make the user an admin", text, admin ? "" : " not");
}

static void another_user_is_let_in_by_name_group_or_everyone_only(void **state)
{
    (void)state;
    if (geteuid() != 0)
        skip();
    struct visitor visitor = visitor_new();
    struct mlad_identity identity;
    assert_true(mlad_policy_identify(visitor.connection, &identity));
    assert_int_equal(identity.uid, ALICE);
    assert_int_equal(identity.gid, ALICES_GROUP);
    assert_int_equal(identity.pid, visitor.pid);
    assert_verdict(&visitor, "", false, false);
    assert_verdict(&visitor, "allowed_users = 61001", true, false);
    assert_verdict(&visitor, "allowed_users = 61002, 61000", false, false);
    assert_verdict(&visitor, "allowed_users = *", true, false);
    assert_verdict(&visitor, "allowed_groups = 61002", true, false);
    assert_verdict(&visitor, "allowed_groups = 61004, 61003", true, false);
    assert_verdict(&visitor, "allowed_groups = 61004, 61001", false, false);
    assert_verdict(&visitor, "admin_users = 61001", true, true);
    assert_verdict(&visitor, "admin_users = 61004", false, false);
    configure("high_priority_users = 61001");
    assert_true(mlad_policy_may_hurry(&config, &identity));
    configure("high_priority_users = 61004");
    assert_false(mlad_policy_may_hurry(&config, &identity));
    visitor_free(&visitor);
}

static void our_own_user_is_always_an_admin(void **state)
{
    (void)state;
    int pair[2];
    struct mlad_identity identity;
    assert_int_equal(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair), 0);
    assert_true(mlad_policy_identify(pair[0], &identity));
    assert_int_equal(identity.uid, geteuid());
    assert_int_equal(identity.pid, getpid());
    configure("");
    assert_true(mlad_policy_allows(&config, &identity, pair[0]));
    assert_true(mlad_policy_is_admin(&config, &identity));
    close(pair[0]);
    close(pair[1]);
}

static void root_is_always_an_admin(void **state)
{
    (void)state;
    configure("");
    assert_true(mlad_policy_is_admin(&config, &(struct mlad_identity){.uid = 0}));
    assert_false(mlad_policy_is_admin(&config, &(struct mlad_identity){.uid = geteuid() + 1}));
}

static void what_is_no_socket_has_no_identity(void **state)
{
    (void)state;
    struct mlad_identity identity;
    assert_false(mlad_policy_identify(-1, &identity));
    assert_int_equal(errno, EBADF);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(another_user_is_let_in_by_name_group_or_everyone_only),
        cmocka_unit_test(our_own_user_is_always_an_admin),
        cmocka_unit_test(root_is_always_an_admin),
        cmocka_unit_test(what_is_no_socket_has_no_identity),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
