/* progress.h - a line on stderr for whatever takes longer than a second.
 *
 * One ticker thread prints for the whole process, so that a command may block in any call. On a terminal the line is
 * rewritten in place and wiped at the end; elsewhere a plain line appears after a second and then every ten. */
#ifndef MLACTL_PROGRESS_H
#define MLACTL_PROGRESS_H

#include <stdbool.h>

/* Before anything else here. Also makes SIGINT, SIGTERM and SIGHUP wipe the line and remove the file that
 * progress_guard names. */
void progress_init(bool quiet);

/* What is being done now: "verifying 12 of 36". The time since the last progress_stop is added by the printer. */
void progress(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Nothing is being done: wipe the line. */
void progress_stop(void);

/* A file to unlink should a signal end us; NULL: none. */
void progress_guard(const char *path);

#endif
