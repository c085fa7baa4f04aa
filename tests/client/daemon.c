/* daemon.c - see daemon.h. */
#include "daemon.h"
#include "peer.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

void daemon_restart(struct daemon *daemon)
{
    const char *program = getenv("MLAD_BIN");
    assert_non_null(program);
    char configuration[80], log[80];
    snprintf(configuration, sizeof configuration, "%s/conf", daemon->folder);
    snprintf(log, sizeof log, "%s/log", daemon->folder);
    daemon->pid = fork();
    assert_return_code(daemon->pid, errno);
    if (daemon->pid == 0) {
        int fd = open(log, O_WRONLY | O_CREAT | O_APPEND, 0600);
        dup2(fd, 1);
        dup2(fd, 2);
        execl(program, program, "--devices", "cpu", "--socket", daemon->socket, "--config", configuration, NULL);
        _exit(127);
    }
}

void daemon_start(struct daemon *daemon, const char *configuration)
{
    strcpy(daemon->folder, "/tmp/mla-test-XXXXXX");
    assert_non_null(mkdtemp(daemon->folder));
    snprintf(daemon->socket, sizeof daemon->socket, "%s/s", daemon->folder);
    char path[80];
    snprintf(path, sizeof path, "%s/conf", daemon->folder);
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    fputs(configuration ? configuration : "", file);
    fclose(file);
    daemon_restart(daemon);
}

static int reap(struct daemon *daemon)
{
    int status;
    assert_int_equal(waitpid(daemon->pid, &status, 0), daemon->pid);
    daemon->pid = 0;
    return status;
}

void daemon_kill(struct daemon *daemon)
{
    kill(daemon->pid, SIGKILL);
    reap(daemon);
}

static int remove_one(const char *path, const struct stat *status, int type, struct FTW *walk)
{
    (void)status, (void)type, (void)walk;
    return remove(path);
}

void daemon_stop(struct daemon *daemon)
{
    kill(daemon->pid, SIGTERM);
    int status = reap(daemon);
    nftw(daemon->folder, remove_one, 8, FTW_DEPTH | FTW_PHYS);
    assert_int_equal(status, 0);
}

static bool receive(int fd, enum mlap_type type, union mlap_body *body)
{
    static uint8_t inbox[MLAP_MAX_MESSAGE];
    int fds[MLAP_MAX_FDS];
    unsigned n_fds = 0;
    struct mlap_header header;
    long length = mlap_receive(fd, inbox, sizeof inbox, fds, &n_fds, 0);
    return length > 0 && mlap_decode(inbox, (size_t)length, &header, body, NULL) == MLAP_code_OK && header.type == type;
}

pid_t daemon_worker(struct daemon *daemon)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strcpy(address.sun_path, daemon->socket);
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    union mlap_body *body = calloc(1, sizeof *body);
    struct mlap_hello hello = {.client = "test"};
    struct mlap_status status = {0};
    pid_t worker = 0;
    if (connect(fd, (struct sockaddr *)&address, sizeof address) == 0 &&
        mlap_send_message(fd, MLAP_HELLO, 1, &hello, -1, 0) == 0 && receive(fd, MLAP_WELCOME, body) &&
        mlap_send_message(fd, MLAP_STATUS, 2, &status, -1, 0) == 0 && receive(fd, MLAP_STATUS_REPLY, body))
        worker = (pid_t)body->status_reply_.devices[0].pid;
    free(body);
    close(fd);
    return worker;
}
