/* daemon.h - a real mlad ($MLAD_BIN, device cpu) on a private socket in a temporary folder; owned by the test. */
#ifndef DAEMON_H
#define DAEMON_H

#include <sys/types.h>

struct daemon { char folder[64], socket[80]; pid_t pid; };

/* `configuration` may be NULL. */
void daemon_start(struct daemon *daemon, const char *configuration);
void daemon_kill(struct daemon *daemon);        /* -9; the folder stays */
void daemon_restart(struct daemon *daemon);     /* after daemon_kill, on the same socket */
void daemon_stop(struct daemon *daemon);        /* orderly, and the folder is removed */
pid_t daemon_worker(struct daemon *daemon);     /* 0: none just now */

#endif
