/* progress.c - the progress line: a mutex around one text, a thread that prints it when it is old enough. */
#include "progress.h"

#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { TICK_MS = 250, FIRST_MS = 1000, PLAIN_MS = 10000 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static bool enabled, terminal, running;
static char text[160];
static double started_ms, printed_ms;       /* printed_ms 0: not yet */
static volatile sig_atomic_t line_shown;    /* a line stands on the terminal */
static char guarded[4096];
static volatile sig_atomic_t guard_set;

static double now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e3 + (double)now.tv_nsec / 1e6;
}

static void wipe(void)
{
    if (line_shown && write(STDERR_FILENO, "\r\033[K", 4) < 0)
        return; /* nobody looks */
    line_shown = 0;
}

static void tick(void)
{
    double now = now_ms(), age = now - started_ms;
    if (!*text || age < FIRST_MS || (!terminal && printed_ms > 0 && now - printed_ms < PLAIN_MS))
        return;
    char line[200];
    int length = snprintf(line, sizeof line, terminal ? "\r\033[K%s, %.0f s" : "%s, %.0f s\n", text, age / 1000);
    if (terminal)
        line_shown = 1;
    if (write(STDERR_FILENO, line, (size_t)length) < 0)
        enabled = false;
    printed_ms = now;
}

static void *ticker(void *unused)
{
    (void)unused;
    for (;;) {
        nanosleep(&(struct timespec){.tv_nsec = TICK_MS * 1000000L}, NULL);
        pthread_mutex_lock(&lock);
        if (enabled)
            tick();
        pthread_mutex_unlock(&lock);
    }
    return NULL;
}

/* Only async-signal-safe calls. SA_RESETHAND has restored the default, so raising again ends the process as its parent
 * expects. */
static void on_signal(int number)
{
    wipe();
    if (guard_set)
        unlink(guarded);
    raise(number);
}

void progress_init(bool quiet)
{
    terminal = isatty(STDERR_FILENO);
    enabled = !quiet;
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = (int)SA_RESETHAND | SA_NODEFER};
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGHUP, &action, NULL);
}

void progress(const char *format, ...)
{
    if (!enabled)
        return;
    pthread_mutex_lock(&lock);
    if (!running) {
        pthread_t thread;
        running = pthread_create(&thread, NULL, ticker, NULL) == 0;
        if (running)
            pthread_detach(thread);
    }
    if (!*text) {
        started_ms = now_ms();
        printed_ms = 0;
    }
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    pthread_mutex_unlock(&lock);
}

void progress_stop(void)
{
    pthread_mutex_lock(&lock);
    *text = 0;
    wipe();
    pthread_mutex_unlock(&lock);
}

void progress_guard(const char *path)
{
    guard_set = 0;
    if (path && strlen(path) < sizeof guarded) {
        strcpy(guarded, path);
        guard_set = 1;
    }
}
