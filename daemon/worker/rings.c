/* rings.c - see rings.h. */
#include "rings.h"

#include "session.h"

#include <fcntl.h>
#include <inttypes.h>
#include <sys/mman.h>
#include <unistd.h>

/* ---- memory ---- */

/* A sealed memfd, or -1. */
static int make_memory(size_t bytes)
{
    int fd = memfd_create("mlad-rings", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd >= 0 && ftruncate(fd, (off_t)bytes) == 0 &&
        fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0)
        return fd;
    if (fd >= 0)
        close(fd);
    return -1;
}

bool mlad_rings_offer(struct mlad_session *session)
{
    struct mlad_rings *rings = &session->rings;
    const size_t bytes = mlap_rings_bytes(MLAD_RING_ENTRIES);
    int fd = make_memory(bytes);
    void *mapping = fd < 0 ? MAP_FAILED : mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    bool offered = mapping != MAP_FAILED;
    if (offered) {
        mlap_rings_init(mapping, MLAD_RING_ENTRIES);
        rings->mapping = mapping;
        offered = mlap_rings_open(mapping, bytes, &rings->submission, &rings->completion) == 0 &&
                  mlap_send_message(session->link.fd, MLAP_RING_MEMORY, 0,
                                    &(struct mlap_ring_memory){.entries = MLAD_RING_ENTRIES}, fd, MSG_DONTWAIT) == 0;
    }
    if (!offered)
        mlad_rings_close(session);
    if (fd >= 0)
        close(fd);
    return offered;
}

void mlad_rings_close(struct mlad_session *session)
{
    if (session->rings.mapping)
        munmap(session->rings.mapping, mlap_rings_bytes(MLAD_RING_ENTRIES));
    session->rings.mapping = NULL;
}

/* ---- completions ---- */

bool mlad_rings_complete(struct mlad_session *session, const struct mlap_completion *completion)
{
    struct mlad_rings *rings = &session->rings;
    if (!rings->mapping)
        return false;
    union mlap_entry entry = {.completion = *completion};
    if (mlap_ring_push(&rings->completion, &entry) != 0) {
        rings->broken |= errno == EPROTO;
        return false;
    }
    if (mlap_ring_take_wakeup(&rings->completion))
        mlad_link_send(&session->link, MLAP_NEWS, 0, &(struct mlap_news){0});
    return true;
}

/* ---- submissions ---- */

/* Do what an entry asks for: it is answered once it is done, or else by its fault. */
static enum mlap_code act(struct mlad_session *session, const struct mlap_submission *entry, struct mlap_fault *fault)
{
    const uint64_t received = mlad_now_ns();
    const bool arms = entry->operation == MLAP_OPERATION_ARM;
    if (!arms && entry->operation != MLAP_OPERATION_SUBMIT)
        return mlap_fail(fault, MLAP_code_INVALID, "submission.operation",
                         "%" PRIu32 " is no operation; %d runs a plan, and %d arms a step", entry->operation,
                         MLAP_OPERATION_SUBMIT, MLAP_OPERATION_ARM);
    if (!arms && entry->round)
        return mlap_fail(fault, MLAP_code_INVALID, "submission.round",
                         "a plan has no rounds, so it must be 0; %d arms a step", MLAP_OPERATION_ARM);
    uint32_t zero = 0;
    for (size_t i = 0; i < sizeof entry->zero / sizeof *entry->zero; i++)
        zero |= entry->zero[i];
    if (zero)
        return mlap_fail(fault, MLAP_code_INVALID, "submission.zero",
                         "bytes %zu to %zu of an entry must be 0", offsetof(struct mlap_submission, zero),
                         sizeof *entry - 1);
    if (!arms)
        return mlad_session_submit(session, entry->sequence, entry->plan, received, fault);
    const struct mlap_arm arm = {.step = entry->step, .round = entry->round};
    return mlad_ordered_arm(session, &arm, entry->sequence, received, fault);
}

static void drop(struct mlad_session *session, const char *field, const char *what)
{
    struct mlap_fault fault;
    mlap_fail(&fault, MLAP_code_MALFORMED, field, "%s; connect again", what);
    mlad_session_refuse(session, 0, &fault);
    mlad_session_drop(session, &fault);
}

/* Take one entry. False: there is none. */
static bool take(struct mlad_session *session)
{
    struct mlad_rings *rings = &session->rings;
    if (!rings->mapping || session->link.lost || session->link.deaf)
        return false;
    if (rings->broken) {
        drop(session, "completion.head", "more entries were taken from the completion ring than were in it");
        return true;
    }
    union mlap_entry entry;
    if (!mlap_ring_has_news(&rings->submission))
        return false;
    if (mlap_ring_pop(&rings->submission, &entry) != 0) {
        if (errno == EAGAIN)
            return false;
        drop(session, "submission.tail", "the submission ring is said to hold more entries than it can");
        return true;
    }
    if (rings->asks)
        mlap_ring_set_wakeup(&rings->submission, false);
    rings->asks = false;
    session->sessions->heard = mlad_now_ns();
    struct mlap_fault fault;
    if (entry.submission.sequence == 0)
        drop(session, "submission.sequence", "it must not be 0, which stands for none");
    else if (act(session, &entry.submission, &fault) != MLAP_code_OK)
        mlad_session_refuse(session, entry.submission.sequence, &fault);
    return true;
}

bool mlad_rings_look(struct mlad_sessions *sessions)
{
    bool any = false;
    struct mlad_session *session;
    TAILQ_FOREACH(session, &sessions->all, entry) /* one that ends here is freed in a later turn of the loop */
        any |= take(session);
    return any;
}

void mlad_rings_catch_up(struct mlad_session *session)
{
    for (uint32_t i = 0; i < MLAD_RING_ENTRIES && take(session); i++)
        ;
}

/* ---- sleep ---- */

bool mlad_rings_linger(const struct mlad_sessions *sessions)
{
    /* A device that computes on this processor has better use for it while a launch runs. */
    const struct mlad_scheduler *scheduler = sessions->scheduler;
    return (scheduler->in_flight == 0 || scheduler->backend->launch_batches) &&
           mlad_now_ns() - sessions->heard < MLAD_LINGER_NS;
}

bool mlad_rings_ask(struct mlad_sessions *sessions)
{
    bool news = false;
    struct mlad_session *session;
    TAILQ_FOREACH(session, &sessions->all, entry) {
        struct mlad_rings *rings = &session->rings;
        if (!rings->mapping || session->link.lost || session->link.deaf)
            continue;
        if (!rings->asks)
            mlap_ring_set_wakeup(&rings->submission, true);
        rings->asks = true;
        news |= rings->broken || mlap_ring_has_news(&rings->submission);
    }
    return !news;
}
