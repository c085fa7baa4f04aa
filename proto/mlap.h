/* mlap.h - the protocol's two doors: messages to bytes and back (mlap_encode.c, mlap_decode.c),
 * datagrams with file descriptors (mlap_socket.c).
 *
 * A message on the wire is one SEQPACKET datagram holding one msgpack array
 *     [version, type, sequence, {field: value, ...}]
 * plus the file descriptors its type asks for. Nothing here keeps state: every
 * function is thread-safe as long as its arguments are not shared. */
#ifndef MLAP_H
#define MLAP_H

#include "mlap_messages.h"

#include <stddef.h>

/* What went wrong, in the words that an ERROR message carries. */
struct mlap_fault {
    enum mlap_code code;
    char field[64];
    char message[512];
};

/* Fill `fault` (NULL is allowed) with a printf-style sentence and return `code`. Long text is cut; what is no
 * printable UTF-8 becomes '?', so that a fault can always be sent. */
enum mlap_code mlap_fail(struct mlap_fault *fault, enum mlap_code code, const char *field, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

struct mlap_header {
    uint32_t version;
    uint32_t type;       /* enum mlap_type, or an unknown number */
    uint32_t sequence;   /* chosen by the sender of a request, echoed by its answer; 0: unasked */
};

/* Any message; the member in use is header.type's. Large (see sizeof): allocate it, or keep one per thread. */
union mlap_body {
#define MLAP_BODY_MEMBER(TYPE, M, number, fds, FROM, doc) struct mlap_##M M##_;
    MLAP_MESSAGES(MLAP_BODY_MEMBER)
#undef MLAP_BODY_MEMBER
};

/* Encode `body` (a struct mlap_<message> matching `type`) into `buffer` of `capacity` bytes.
 * Returns the length, or -1 with errno: EMSGSIZE (does not fit), EINVAL (a value is out of its bounds, or
 * `type` is no message): the caller's mistake. Allocates nothing. */
long mlap_encode(void *buffer, size_t capacity, enum mlap_type type, uint32_t sequence, const void *body);

/* Decode `length` bytes. `header` is filled as far as it could be read (for the ERROR's sequence), even on
 * failure. `body` is wholly overwritten on success (absent fields with zero; of a list only n_<name> entries).
 * Bounds, unknown, repeated and missing fields are refused, trailing bytes too. Safe on hostile bytes: counts and
 * depth are checked against the remaining length before anything is unpacked; memory used is bounded by `length`.
 * Returns MLAP_code_OK or `fault`'s code. */
enum mlap_code mlap_decode(const void *bytes, size_t length, struct mlap_header *header, union mlap_body *body,
                           struct mlap_fault *fault);

/* Facts about a type; NULL or -1 if unknown. */
const char *mlap_type_name(uint32_t type);          /* "REGISTER" */
int mlap_type_fds(uint32_t type);                   /* most file descriptors it carries; unless 0, at least one */
bool mlap_fds_fit(uint32_t type, unsigned n_fds);
enum mlap_from { MLAP_FROM_CLIENT, MLAP_FROM_DAEMON, MLAP_FROM_INTERNAL };
int mlap_type_from(uint32_t type);                  /* enum mlap_from */

/* Wire text of an enumerator ("?" if it is none), and back (-1 if unknown): mlap_code_text(MLAP_code_BUSY) is
 * "busy". */
#define MLAP_DECLARE_TEXT(M, doc) \
    const char *mlap_##M##_text(enum mlap_##M value); \
    int mlap_##M##_from_text(const char *text);
MLAP_ENUMS(MLAP_DECLARE_TEXT)
#undef MLAP_DECLARE_TEXT

/* ---- datagrams ---- */

/* Send one datagram, with `fd` unless it is -1. Never blocks when `flags` has MSG_DONTWAIT; MSG_NOSIGNAL is
 * always added. Returns 0, or -1 with errno (EAGAIN: full, or the kernel lacks memory; EPIPE, ECONNRESET: the peer has
 * gone). */
int mlap_send(int socket, const void *bytes, size_t length, int fd, int flags);
/* The same with up to MLAP_MAX_FDS descriptors. They stay the caller's. */
int mlap_send_fds(int socket, const void *bytes, size_t length, const int *fds, unsigned n_fds, int flags);

/* Receive one datagram into `buffer`. fds[0..*n_fds) are the caller's to close; close-on-exec is set. With fds NULL
 * descriptors are not taken at all, and *n_fds says 1 if any came: closing a stranger's descriptor can block, for
 * as long as a file system of theirs likes. `capacity` must be MLAP_MAX_MESSAGE at least to hold any legal message.
 * Returns its length; 0 at end of file; -1 with errno: EAGAIN (nothing there, or the kernel lacks memory), EMSGSIZE
 * (too long, or too many descriptors: MSG_TRUNC or MSG_CTRUNC; the datagram is consumed, every descriptor closed,
 * and the session must end), or the socket's error. */
long mlap_receive(int socket, void *buffer, size_t capacity, int fds[MLAP_MAX_FDS], unsigned *n_fds, int flags);

/* mlap_encode into a stack buffer + mlap_send. -1 with errno as both. */
int mlap_send_message(int socket, enum mlap_type type, uint32_t sequence, const void *body, int fd, int flags);

#endif
