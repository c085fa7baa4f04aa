/* wait.c - waiting without a thread of our own: leader and followers.
 *
 * Of the threads that wait on one client, one leads: it receives for all. The others sleep, each on its own condition,
 * until their call is answered or the leadership is free. The leader gives it up as soon as its own call is done, and
 * wakes one sleeper to take it over. A thread alone therefore pays one send and one receive for a decode. */
#include "mlac.h"

#include <time.h>

int64_t mlac_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

int64_t mlac_deadline(int timeout_ms)
{
    if (timeout_ms == MLA_FOREVER)
        return MLAC_NEVER;
    return timeout_ms == 0 ? 0 : mlac_now() + timeout_ms * MLAC_MS;
}

void mlac_wake(struct mla_client *client, uint64_t id)
{
    struct mlac_sleeper *sleeper;
    TAILQ_FOREACH(sleeper, &client->sleepers, entry)
        if (sleeper->id == id)
            pthread_cond_signal(&sleeper->woken);
}

static void follow(struct mla_client *client, uint64_t id, int64_t until)
{
    struct mlac_sleeper self = {.id = id, .woken = PTHREAD_COND_INITIALIZER};
    TAILQ_INSERT_TAIL(&client->sleepers, &self, entry);
    mlac_fd_update(client);
    if (until == MLAC_NEVER) {
        pthread_cond_wait(&self.woken, &client->lock);
    } else {
        struct timespec at = {.tv_sec = until / 1000000000, .tv_nsec = until % 1000000000};
        pthread_cond_clockwait(&self.woken, &client->lock, CLOCK_MONOTONIC, &at);
    }
    TAILQ_REMOVE(&client->sleepers, &self, entry);
    pthread_cond_destroy(&self.woken);
}

static int64_t earlier(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static bool waits(struct mla_client *client, uint64_t id, enum mlac_state goal)
{
    const struct mlac_call *call = mlac_call_find(client, id);
    bool accepted = call && call->established && goal == MLAC_KEPT;     /* perhaps on its way to be accepted again */
    return call && call->state < goal && !accepted;
}

static mla_status await(struct mla_client *client, uint64_t id, enum mlac_state goal, int64_t deadline)
{
    while (waits(client, id, goal)) {
        int64_t now = mlac_now();
        mlac_recover(client, now);
        if (!waits(client, id, goal))
            break;
        bool late = now >= deadline;
        int64_t until = late ? 0 : earlier(deadline, mlac_timer(client));
        if (client->socket >= 0 && !client->leading) {
            if (!mlac_receive(client, until) && late)
                return MLA_TIMEOUT;
        } else if (late) {
            return MLA_TIMEOUT;
        } else {
            follow(client, id, until);
        }
    }
    return mlac_call_find(client, id) ? MLA_OK : MLA_NOT_FOUND;
}

mla_status mlac_await(struct mla_client *client, uint64_t id, enum mlac_state goal, int64_t deadline)
{
    mla_status status = await(client, id, goal, deadline);
    struct mlac_sleeper *heir = TAILQ_FIRST(&client->sleepers);
    if (heir && !client->leading)
        pthread_cond_signal(&heir->woken);
    return status;
}
