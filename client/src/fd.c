/* fd.c - mla_fd: one descriptor for the caller's event loop, the same over all reconnects.
 *
 * It is an epoll set, made when first asked for, that holds
 *   the socket  while a ticket is uncollected: an answer may have come
 *   a timer     that has expired while a complete ticket waits to be collected (some other thread read its answer), and
 *               that is set to the time at which a reconnect is due
 * Without an uncollected ticket it is silent, so that a loop which has nothing to poll does not spin. The descriptors
 * are the client's. It costs nothing to those who never ask for it. */
#include "mlac.h"

#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <unistd.h>

void mlac_fd_forget(struct mla_client *client)
{
    /* Closing alone would not do: a forked child may hold the socket open. */
    if (client->watched >= 0)
        epoll_ctl(client->epoll, EPOLL_CTL_DEL, client->watched, NULL);
    client->watched = -1;
}

static void set_timer(struct mla_client *client, int64_t at)
{
    struct itimerspec when = {0};
    if (at != MLAC_NEVER)
        when.it_value = (struct timespec){.tv_sec = at / 1000000000, .tv_nsec = at % 1000000000};
    if (client->alarm != at && timerfd_settime(client->timer, TFD_TIMER_ABSTIME, &when, NULL) == 0)
        client->alarm = at;
}

void mlac_fd_update(struct mla_client *client)
{
    if (client->epoll < 0)
        return;
    int64_t at = client->loose ? mlac_timer(client) : MLAC_NEVER;
    int socket = client->loose ? client->socket : -1;
    if (client->watched != socket)
        mlac_fd_forget(client);
    if (client->watched != socket) {
        struct epoll_event event = {.events = EPOLLIN};
        if (epoll_ctl(client->epoll, EPOLL_CTL_ADD, socket, &event) == 0)
            client->watched = socket;
    }
    bool news = client->ready > 0 || client->watched != socket; /* a socket that cannot be watched has to be polled */
    if (!news && client->loose)
        news = mlac_rings_watch(client); /* the daemon's NEWS will come over the socket */
    set_timer(client, news || at == 0 ? 1 : at);
}

/* Locked. */
static void open_set(struct mla_client *client)
{
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN};
    if (epoll >= 0 && timer >= 0 && epoll_ctl(epoll, EPOLL_CTL_ADD, timer, &event) == 0) {
        client->epoll = epoll;
        client->timer = timer;
        return;
    }
    if (epoll >= 0)
        close(epoll);
    if (timer >= 0)
        close(timer);
}

MLA_API int mla_fd(mla_client *client)
{
    mlac_lock(client);
    if (client->epoll < 0)
        open_set(client);
    int fd = client->epoll;
    mlac_unlock(client);
    return fd;
}
