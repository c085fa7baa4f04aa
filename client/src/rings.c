/* rings.c - the submission and completion rings of the present session, and when decodes go through them.
 *
 * The daemon sends their memory before its WELCOME; they last as long as the connection. Plans are submitted and steps
 * armed by the ring while no decode or round that was sent over the socket is unanswered, else by the socket: so the
 * daemon, which empties the ring before it reads a datagram, sees them in the order of the calls. What they need was
 * accepted before, or is being restored: then, too, they follow it over the socket. Completions come by the ring
 * however their decode or round was asked for; what failed, and why, comes over the socket.
 *
 * Pushing is done under the lock; popping by the thread that leads. The daemon's indices are believed no further than
 * the ring's size: what is beyond ends the client like any other break of the protocol. */
#include "mlac.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/sockios.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { KNOCKS = 3 };

struct mlac_rings {
    struct mlap_ring submission, completion;
    size_t bytes;
    void *mapping;
};

bool mlac_rings_open(struct mla_client *client, int fd, uint32_t entries)
{
    const size_t bytes = mlap_rings_bytes(entries);
    struct stat status;
    struct mlac_rings *rings = calloc(1, sizeof *rings);
    void *mapping = MAP_FAILED;
    int seals = fcntl(fd, F_GET_SEALS);
    if (rings && bytes && seals >= 0 && (seals & F_SEAL_SHRINK) && fstat(fd, &status) == 0 &&
        status.st_size >= (off_t)bytes)
        mapping = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (mapping == MAP_FAILED) {
        free(rings);
        return false;
    }
    if (mlap_rings_open(mapping, bytes, &rings->submission, &rings->completion) != 0) {
        munmap(mapping, bytes);
        free(rings);
        return false;
    }
    madvise(mapping, bytes, MADV_DONTFORK);
    rings->bytes = bytes;
    rings->mapping = mapping;
    mlac_rings_close(client);
    client->rings = rings;
    return true;
}

void mlac_rings_close(struct mla_client *client)
{
    struct mlac_rings *rings = client->rings;
    client->rings = NULL;
    if (!rings)
        return;
    if (client->leading) { /* another thread looks at them, and closes them when it is back */
        client->retired = rings;
        return;
    }
    munmap(rings->mapping, rings->bytes);
    free(rings);
}

void mlac_rings_retire(struct mla_client *client)
{
    struct mlac_rings *rings = client->retired;
    client->retired = NULL;
    if (!rings)
        return;
    munmap(rings->mapping, rings->bytes);
    free(rings);
}

/* ---- submissions ---- */

/* Datagrams of ours that the daemon has not read: it will, and empties the ring before it acts on one. */
static bool has_unread(int socket)
{
    int bytes = 0;
    return ioctl(socket, SIOCOUTQ, &bytes) == 0 && bytes > 0;
}

/* The wake-up that we took is ours to give. A socket that is full gives it for us; the kernel may also lack memory,
 * which mlap_send does not tell apart, for a moment or for longer. If it lasts, or the peer has gone, the session ends,
 * which whoever leads sees, and the next one is asked again. */
static void knock(struct mla_client *client)
{
    for (int i = 0; i < KNOCKS; i++)
        if (mlap_send_message(client->socket, MLAP_KNOCK, 0, &(struct mlap_knock){0}, -1, MSG_DONTWAIT) == 0 ||
            has_unread(client->socket))
            return;
    client->broken = true;
    shutdown(client->socket, SHUT_WR);
}

/* What the ring has for a call. False: nothing. */
static bool make_entry(const struct mlac_call *call, union mlap_entry *entry)
{
    *entry = (union mlap_entry){.submission = {.sequence = (uint32_t)call->id}};
    switch (call->type) {
    case MLAP_SUBMIT:
        entry->submission.operation = MLAP_OPERATION_SUBMIT;
        entry->submission.plan = (uint32_t)call->plan->call->id;
        return true;
    case MLAP_ARM:
        entry->submission.operation = MLAP_OPERATION_ARM;
        entry->submission.step = (uint32_t)call->step->call->id;
        entry->submission.round = call->round;
        return true;
    default:
        return false;
    }
}

bool mlac_rings_submit(struct mla_client *client, const struct mlac_call *call)
{
    struct mlac_rings *rings = client->rings;
    union mlap_entry entry;
    if (!rings || client->posted || client->replaying || !make_entry(call, &entry))
        return false;
    if (mlap_ring_push(&rings->submission, &entry) != 0)
        return false; /* full; or its index is nonsense, which is the daemon's to find out */
    if (mlap_ring_take_wakeup(&rings->submission))
        knock(client);
    return true;
}

/* ---- completions ---- */

int mlac_rings_take(struct mlac_rings *rings, struct mlap_completion *to, int most)
{
    int taken = 0;
    union mlap_entry entry;
    while (rings && taken < most && mlap_ring_has_news(&rings->completion)) {
        if (mlap_ring_pop(&rings->completion, &entry) != 0) {
            if (errno == EAGAIN)
                break;
            return taken ? taken : -1;
        }
        to[taken++] = entry.completion;
    }
    return taken;
}

bool mlac_rings_news(const struct mlac_rings *rings)
{
    return rings && mlap_ring_has_news(&rings->completion);
}

void mlac_rings_ask(struct mlac_rings *rings, bool asked)
{
    if (rings)
        mlap_ring_set_wakeup(&rings->completion, asked);
}

bool mlac_rings_watch(struct mla_client *client)
{
    if (!client->rings || client->leading)
        return false;
    mlac_rings_ask(client->rings, true);
    return mlac_rings_news(client->rings);
}

bool mlac_rings_completed(struct mla_client *client, const struct mlap_completion *completion)
{
    uint32_t zero = completion->code | completion->failed;
    for (size_t i = 0; i < sizeof completion->zero / sizeof *completion->zero; i++)
        zero |= completion->zero[i];
    struct mlap_done *done = &client->done;
    done->receive_ns = completion->receive_ns;
    done->queue_ns = completion->queue_ns;
    done->kernel_ns = completion->kernel_ns;
    done->kv_tokens = completion->kv_tokens;
    done->failed = 0;
    done->n_failures = 0;
    return zero == 0 && mlac_done(client, completion->sequence, done);
}
