/* doctor.c - `mlactl doctor`: what stands between this user's engines and a better placement, and what to do.
 *
 * A finding is one line: ok, warn or fail, what is so, and for the latter two the remedy. Looks only: it opens no GPU
 * and changes nothing. */
#include "admin.h"
#include "gpu.h"
#include "mlap_placement.h"
#include "output.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

enum verdict { OK, WARNING, FAILURE };
static const char *const verdict_texts[] = {"ok", "warn", "fail"};

struct doctor {
    const struct ctl *ctl;
    cJSON *findings;
    unsigned warnings, failures;
    int code;   /* CTL_NOT_RUNNING once that is known */
};

/* `remedy` is "" for what is well; `format` makes the sentence. */
static void found(struct doctor *doctor, enum verdict verdict, const char *check, const char *remedy,
                  const char *format, ...) __attribute__((format(printf, 5, 6)));
static void found(struct doctor *doctor, enum verdict verdict, const char *check, const char *remedy,
                  const char *format, ...)
{
    char text[1024];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    doctor->warnings += verdict == WARNING;
    doctor->failures += verdict == FAILURE;
    if (doctor->ctl->json) {
        cJSON *finding = cJSON_CreateObject();
        cJSON_AddStringToObject(finding, "check", check);
        cJSON_AddStringToObject(finding, "verdict", verdict_texts[verdict]);
        cJSON_AddStringToObject(finding, "finding", text);
        cJSON_AddStringToObject(finding, "remedy", remedy);
        cJSON_AddItemToArray(doctor->findings, finding);
        return;
    }
    output_print(verdict == OK ? GOOD : verdict == WARNING ? WARN : BAD, "%-4s", verdict_texts[verdict]);
    printf("  %-7s %s%s%s\n", check, text, *remedy ? "; " : "", remedy);
}

/* ---- the daemon ---- */

static void check_socket(struct doctor *doctor)
{
    const char *path = doctor->ctl->socket;
    struct stat is;
    if (stat(path, &is) < 0)
        found(doctor, FAILURE, "socket", "start mlad, or name its socket by --socket or MLAD_SOCKET", "%s: %s", path,
              strerror(errno));
    else if (!S_ISSOCK(is.st_mode))
        found(doctor, FAILURE, "socket", "name mlad's socket by --socket or MLAD_SOCKET", "%s is no socket", path);
    else if (access(path, W_OK) < 0)
        found(doctor, FAILURE, "socket", "set SocketMode= of mlad.socket, or socket_mode of mlad.conf; allowed_users "
              "and allowed_groups decide who may connect", "user %u may not write to %s (mode %04o, owner %u)",
              geteuid(), path, is.st_mode & 07777, is.st_uid);
    else
        found(doctor, OK, "socket", "", "%s, mode %04o, owner %u", path, is.st_mode & 07777, is.st_uid);
}

/* NULL: it does not answer. */
static struct mlap_status_reply *check_daemon(struct doctor *doctor)
{
    admin_auto struct admin *admin = NULL;
    struct mlap_status_reply *status = NULL;
    struct ctl_fault fault;
    int code = admin_new(doctor->ctl, &admin, &fault);
    code = code ? code : admin_status(admin, &status, &fault);
    if (code == CTL_NOT_RUNNING)
        doctor->code = code;
    if (code) {
        found(doctor, FAILURE, "daemon", code == CTL_NOT_RUNNING ? "systemctl start mlad" : "its log says more", "%s",
              fault.text);
        return NULL;
    }
    found(doctor, OK, "daemon", "", "%s answers, pid %u", status->daemon, status->pid);
    if (mlap_has(status, status_reply, note))
        found(doctor, WARNING, "daemon", "name the GPUs by UUID in mlad.conf if there should be some", "%s",
              status->note);
    return status;
}

static void check_device(struct doctor *doctor, const struct mlap_device *d)
{
    const char *state = mlap_device_state_text(d->state);
    if (d->state == MLAP_device_state_ABSENT)
        found(doctor, FAILURE, "device", "nvidia-smi -L lists the GPUs by UUID; the worker needs /dev/nvidia*",
              "%s is absent: %s", d->name, d->reason);
    else if (!d->responding && d->pid)
        found(doctor, WARNING, "device", "wait for worker_timeout, or look at the log", "%s does not answer", d->name);
    else if (d->state != MLAP_device_state_READY)
        found(doctor, WARNING, "device", "wait, or look at the log", "%s is %s: %s", d->name, state, d->reason);
    else if (d->restarts)
        found(doctor, WARNING, "device", "the log says what ended it", "%s is ready; its worker was started again %u "
              "time%s", d->name, d->restarts, d->restarts == 1 ? "" : "s");
    else
        found(doctor, OK, "device", "", "%s is ready, %s", d->name, d->variant);
}

/* ---- the GPU and MPS, as this process sees them ---- */

static void check_driver(struct doctor *doctor, bool wanted)
{
    int node = open("/dev/nvidiactl", O_RDWR | O_CLOEXEC);
    if (node >= 0) {
        close(node);
        found(doctor, OK, "gpu", "", "this user may open /dev/nvidiactl");
    } else if (errno == ENOENT) {
        found(doctor, wanted ? WARNING : OK, "gpu",
              wanted ? "load the driver (nvidia-persistenced makes the nodes), or give the container the GPU" : "",
              "there is no /dev/nvidiactl: a client here has no GPU of its own");
    } else {
        found(doctor, WARNING, "gpu", "add this user to the group that owns it", "/dev/nvidiactl: %s",
              strerror(errno));
    }
}

struct control {
    pid_t pid;          /* 0: none that lives, or it is not known */
    uid_t uid;
    bool multiuser;
};

/* The control daemon whose pipes are in `directory`; false: none has been there. */
static bool find_control(const char *directory, struct control *control)
{
    char path[MLAP_MPS + 64], line[4096];
    struct stat is;
    *control = (struct control){0};
    snprintf(path, sizeof path, "%s/control", directory);
    if (stat(path, &is) < 0)
        return false;
    control->uid = is.st_uid;
    snprintf(path, sizeof path, "%s/nvidia-cuda-mps-control.pid", directory);
    FILE *file = fopen(path, "re");
    int pid;
    if (file && fscanf(file, "%d", &pid) == 1 && pid > 0 && (kill(pid, 0) == 0 || errno == EPERM))
        control->pid = pid;
    if (file)
        fclose(file);
    snprintf(path, sizeof path, "/proc/%d/cmdline", (int)control->pid);
    file = control->pid ? fopen(path, "re") : NULL;
    size_t length = file ? fread(line, 1, sizeof line - 1, file) : 0;
    line[length] = '\0';
    for (const char *word = line; word < line + length; word += strlen(word) + 1)
        control->multiuser |= strcmp(word, "-multiuser-server") == 0;
    if (file)
        fclose(file);
    return true;
}

static void check_users(struct doctor *doctor, const char *directory, const struct control *control, uid_t worker)
{
    if (control->pid && control->multiuser)
        found(doctor, OK, "mps", "", "the control daemon of %s serves all users at once (-multiuser-server): they "
              "share one fault domain with weaker isolation", directory);
    else if (control->uid != 0 && control->uid != geteuid())
        found(doctor, WARNING, "mps", "run mlad, MPS and the engine as one user, or MPS as root with -multiuser-server",
              "the control daemon of %s is user %u's and serves nobody else; this is user %u", directory, control->uid,
              geteuid());
    else if (worker != (uid_t)-1 && worker != geteuid())
        found(doctor, WARNING, "mps", "run the engine as that user, or MPS as root with -multiuser-server",
              "the worker is user %u's and this is user %u: MPS serves one user at a time, and makes others wait",
              worker, geteuid());
    else
        found(doctor, OK, "mps", "", "its control daemon runs as user %u and can serve user %u", control->uid,
              geteuid());
}

static uid_t owner_of(uint32_t pid)
{
    char path[32];
    struct stat is;
    snprintf(path, sizeof path, "/proc/%u", pid);
    return pid && stat(path, &is) == 0 ? is.st_uid : (uid_t)-1;
}

/* A worker that has a GPU. */
static void check_worker_mps(struct doctor *doctor, const struct mlap_device *d)
{
    char here[MLAP_MPS];
    struct control control;
    bool named = mlap_mps_directory(here), there = named && find_control(here, &control);
    if (!mlap_has(d, device, mps)) {
        found(doctor, WARNING, "mps", there ? "start mlad again, after the control daemon and with the same "
              "CUDA_MPS_PIPE_DIRECTORY" : "start mlad-mps.service and then mlad again, or give the worker a GPU of its "
              "own; mlad-placements(7) compares",
              "the worker of %s is not under MPS%s: an engine on that GPU takes turns with it, some 300 us a call",
              d->name, there ? ", though a control daemon is there" : "");
        return;
    }
    if (!named || strcmp(here, d->mps) != 0)
        found(doctor, WARNING, "mps", "start engines by `mlactl run -- COMMAND`, which sets it",
              "the worker of %s is under the MPS of %s, and this environment names %s", d->name, d->mps,
              named ? here : "a directory with too long a name");
    else
        found(doctor, OK, "mps", "", "the worker of %s is under the MPS of %s, and so are engines of this environment",
              d->name, d->mps);
    if (!find_control(d->mps, &control))
        found(doctor, FAILURE, "mps", "choose a directory that engines see too: a PrivateTmp= service has a /tmp of "
              "its own", "there is no pipe of a control daemon in %s here", d->mps);
    else if (!control.pid)
        found(doctor, WARNING, "mps", "start the control daemon again, then mlad", "%s has a pipe, and its control "
              "daemon does not run here", d->mps);
    else
        check_users(doctor, d->mps, &control, owner_of(d->pid));
}

/* ---- limits of this process, as an engine started from here would have them ---- */

static void check_limits(struct doctor *doctor, bool gpu)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_max < 1024)
        found(doctor, WARNING, "limits", "raise it (LimitNOFILE=, ulimit -n)", "at most %llu descriptors: GPU memory "
              "of cuMemCreate goes by up to 252 of them a buffer", (unsigned long long)limit.rlim_max);
    else
        found(doctor, OK, "limits", "", "enough descriptors for buffers");
    if (gpu && getrlimit(RLIMIT_MEMLOCK, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY && limit.rlim_cur < 64 << 20)
        found(doctor, WARNING, "limits", "raise it (LimitMEMLOCK=, ulimit -l) if cudaHostRegister fails",
              "%llu bytes may be locked in memory", (unsigned long long)limit.rlim_cur);
}

static void check_all(struct doctor *doctor)
{
    const char *only = ctl_value(doctor->ctl, "--device");
    bool gpu = false;
    check_socket(doctor);
    ctl_autofree struct mlap_status_reply *status = check_daemon(doctor);
    if (status && only && !admin_find(status, only))
        found(doctor, FAILURE, "device", "`mlactl status` lists those that are", "no device %s is served here", only);
    for (unsigned i = 0; status && i < status->n_devices; i++) {
        const struct mlap_device *d = &status->devices[i];
        if (only && strcmp(only, d->name) != 0)
            continue;
        check_device(doctor, d);
        gpu |= gpu_named(d->name);
        if (gpu_named(d->name) && (d->state == MLAP_device_state_READY || d->state == MLAP_device_state_DRAINING))
            check_worker_mps(doctor, d);
    }
    check_driver(doctor, gpu);
    check_limits(doctor, gpu);
}

int ctl_doctor(const struct ctl *ctl)
{
    struct doctor doctor = {.ctl = ctl, .findings = ctl->json ? cJSON_CreateArray() : NULL, .code = CTL_FAILED};
    check_all(&doctor);
    if (ctl->json) {
        cJSON *root = cJSON_CreateObject();
        cJSON_AddItemToObject(root, "findings", doctor.findings);
        cJSON_AddNumberToObject(root, "warnings", doctor.warnings);
        cJSON_AddNumberToObject(root, "failures", doctor.failures);
        output_json(root);
    }
    return doctor.failures ? doctor.code : CTL_OK;
}
