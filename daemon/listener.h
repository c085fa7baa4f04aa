/* listener.h - the listening socket: made here, or passed by systemd.
 *
 * A socket file that we made is removed at the end, one that systemd made never. A file that is in the way is replaced
 * only if nobody answers on it. */
#ifndef MLAD_LISTENER_H
#define MLAD_LISTENER_H

#include <stdbool.h>
#include <sys/stat.h>
#include <uv.h>

struct mlad_listener {
    uv_poll_t poll;
    int fd;
    char path[108]; /* where it listens */
    bool ours;      /* the file is ours to remove: */
    dev_t device;   /* if it is still this one */
    ino_t inode;
    void (*accepted)(struct mlad_listener *listener, int fd);
    void *owner;
};

/* Get the socket: the one systemd passed, or a new one at `path` with permissions `mode`. Its directory is made if it
 * is missing. False: `error` is one sentence. */
bool mlad_listener_open(struct mlad_listener *listener, const char *path, mode_t mode, char *error, size_t size);

/* Accept on the loop: each connection's descriptor goes to `accepted`, which owns it. 0, or a negative libuv error. */
int mlad_listener_start(struct mlad_listener *listener, uv_loop_t *loop,
                        void (*accepted)(struct mlad_listener *listener, int fd), void *owner);

/* Called often: accepts again after descriptors or memory had run out. */
void mlad_listener_tick(struct mlad_listener *listener);

/* Close it and remove a file of ours. Once. */
void mlad_listener_close(struct mlad_listener *listener);

#endif
