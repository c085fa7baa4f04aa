/* control.c - the words of the environment and of the control file; the trace. */
#include "fake_cuda.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { FAILS = 16 };
static struct {
    pthread_mutex_t lock;
    bool started;
    const char *path;
    struct timespec mtime;
    off_t size;
    struct fake_settings set;
    struct { char name[64]; long left; bool every; int code; } fail[FAILS];
    unsigned fails;
    long sticky_left, hang_left;
    bool hang_word;
    int sticky_code, sticky, trace;
} control = {.lock = PTHREAD_MUTEX_INITIALIZER, .trace = -1};

static void parse_word(const char *word)
{
    long a = 0, b = 0;
    char name[64];
    int n;
    if ((n = sscanf(word, "fail=%63[^:]:%ld:%ld", name, &a, &b)) >= 2 && control.fails < FAILS) {
        memcpy(control.fail[control.fails].name, name, sizeof name);
        control.fail[control.fails].left = a;
        control.fail[control.fails].every = a == 0;
        control.fail[control.fails++].code = n == 3 ? (int)b : FAKE_UNKNOWN;
    } else if ((n = sscanf(word, "sticky=%ld:%ld", &a, &b)) >= 1) {
        control.sticky_left = a > 0 ? a : 1;
        control.sticky_code = n == 2 ? (int)b : FAKE_ILLEGAL_ADDRESS;
    } else if (sscanf(word, "hang=%ld", &a) == 1) {
        control.hang_left = a > 0 ? a : 1;
        control.hang_word = true;
    } else if (sscanf(word, "slow=%ld", &a) == 1) control.set.slow = (unsigned)a;
    else if (sscanf(word, "devices=%ld", &a) == 1)
        control.set.devices = a < 1 ? 1 : a > FAKE_DEVICES ? FAKE_DEVICES : (int)a;
    else if (sscanf(word, "peer=%ld", &a) == 1) control.set.peer = (int)a;
    else if (sscanf(word, "no_driver_device=%ld", &a) == 1) control.set.no_device = (int)a;
    else if (sscanf(word, "cc=%ld.%ld", &a, &b) == 2) control.set.major = (int)a, control.set.minor = (int)b;
    else if (sscanf(word, "smem=%ld", &a) == 1) control.set.smem = (int)a;
    else if (sscanf(word, "processors=%ld", &a) == 1) control.set.processors = a < 1 ? 1 : a > 132 ? 132 : (int)a;
    else if (sscanf(word, "memory=%ld", &a) == 1) control.set.memory = (size_t)a;
    else if (sscanf(word, "own_ipc=%ld", &a) == 1) control.set.own_ipc = (int)a;
    else if (sscanf(word, "mps=%ld", &a) == 1) control.set.mps = (int)a;
    else if (*word && *word != '#') fprintf(stderr, "fake_cuda: unknown word %s\n", word);
}

static void parse(char *text)
{
    char *rest = NULL;
    for (char *w = strtok_r(text, " \t\r\n", &rest); w; w = strtok_r(NULL, " \t\r\n", &rest)) parse_word(w);
}

/* With the lock. Counts start again whenever the words are read. */
static void reread(void)
{
    struct stat st = {0};
    if (!control.started) {
        const char *trace = getenv("MLAD_FAKE_CUDA_TRACE");
        control.path = getenv("MLAD_FAKE_CUDA_CONTROL");
        if (trace) control.trace = open(trace, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    } else if (!control.path) return;
    if (control.path && stat(control.path, &st) != 0) memset(&st, 0, sizeof st);
    if (control.started && st.st_size == control.size && st.st_mtim.tv_sec == control.mtime.tv_sec &&
        st.st_mtim.tv_nsec == control.mtime.tv_nsec) return;
    control.started = true;
    control.size = st.st_size;
    control.mtime = st.st_mtim;
    control.set = (struct fake_settings){
        .devices = 1, .peer = 1, .major = 9, .smem = 232448, .processors = 4, .memory = (size_t)1 << 30};
    control.fails = 0;
    control.sticky_left = control.hang_left = 0;
    control.hang_word = false;
    char text[4096] = "";
    const char *words = getenv("MLAD_FAKE_CUDA");
    if (words) snprintf(text, sizeof text, "%s", words), parse(text);
    FILE *file = control.path ? fopen(control.path, "re") : NULL;
    if (!file) return;
    text[fread(text, 1, sizeof text - 1, file)] = '\0';
    fclose(file);
    parse(text);
}

struct fake_settings fake_settings(void)
{
    pthread_mutex_lock(&control.lock);
    reread();
    struct fake_settings set = control.set;
    pthread_mutex_unlock(&control.lock);
    return set;
}

/* What may wait for the device or for memory that a stream still uses: a capture does not survive it. */
static bool unsafe_in_capture(const char *function)
{
    static const char *const names[] = {"cuMemAlloc_v2", "cuMemFree_v2", "cuMemHostAlloc", "cuMemFreeHost",
        "cuMemHostRegister_v2", "cuMemHostUnregister", "cuMemcpy", "cuMemcpyHtoD_v2", "cuMemcpyDtoH_v2",
        "cuMemcpyDtoD_v2", "cuMemsetD8_v2", "cuModuleLoadData", "cuModuleUnload", "cuCtxSynchronize"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!strcmp(function, names[i])) return true;
    return false;
}

CUresult fake_enter(const char *function)
{
    CUresult result = FAKE_OK;
    size_t length = strlen(function);
    if (length > 3 && !strcmp(function + length - 3, "_v2")) length -= 3;
    pthread_mutex_lock(&control.lock);
    reread();
    for (unsigned i = 0; i < control.fails; i++) {
        if (strlen(control.fail[i].name) != length || strncmp(control.fail[i].name, function, length)) continue;
        if (control.fail[i].every || (control.fail[i].left > 0 && --control.fail[i].left == 0))
            result = control.fail[i].code;
    }
    bool pure = !strncmp(function, "cuGet", 5) || !strncmp(function, "cuDevice", 8) ||
                !strncmp(function, "cuInit", 6) || !strncmp(function, "cuDriver", 8) ||
                !strcmp(function, "cuGraphDestroy") || !strcmp(function, "cuGraphExecDestroy") ||
                !strcmp(function, "cuEventDestroy_v2"); /* they lie in the host's memory */
    if (!result && !pure) result = control.sticky;
    pthread_mutex_unlock(&control.lock);
    return !result && unsafe_in_capture(function) && fake_capturing() ? FAKE_CAPTURE_UNSUPPORTED : result;
}

void fake_note(const char *line)
{
    char whole[256];
    if (control.trace < 0) return;
    int n = snprintf(whole, sizeof whole, "%d %s\n", (int)getpid(), line);
    if (write(control.trace, whole, (size_t)n) != n) fprintf(stderr, "fake_cuda: the trace is not whole\n");
}

CUresult fake_leave(const char *function, CUresult result)
{
    char line[128];
    snprintf(line, sizeof line, "%s %d", function, result);
    return fake_note(line), result;
}

int fake_next_launch(bool *hang)
{
    pthread_mutex_lock(&control.lock);
    *hang = control.hang_left > 0 && --control.hang_left == 0;
    int code = control.sticky_left > 0 && --control.sticky_left == 0 ? control.sticky_code : 0;
    pthread_mutex_unlock(&control.lock);
    return code;
}

bool fake_hanging(void)
{
    pthread_mutex_lock(&control.lock);
    reread();
    bool hanging = control.hang_word;
    pthread_mutex_unlock(&control.lock);
    return hanging;
}

void fake_set_sticky(int code)
{
    pthread_mutex_lock(&control.lock);
    control.sticky = code;
    pthread_mutex_unlock(&control.lock);
}

int fake_sticky(void)
{
    pthread_mutex_lock(&control.lock);
    int code = control.sticky;
    pthread_mutex_unlock(&control.lock);
    return code;
}
