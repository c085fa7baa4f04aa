/* engine.c - `mlactl run`: become another program, in the MPS environment of the daemon's worker. */
#include "admin.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* The device to go by: the one that was named, else the first under MPS, else the first GPU's; NULL: none. */
static const struct mlap_device *choose(const struct mlap_status_reply *status, const char *name)
{
    const struct mlap_device *gpu = NULL;
    if (name)
        return admin_find(status, name);
    for (unsigned i = 0; i < status->n_devices; i++) {
        const struct mlap_device *d = &status->devices[i];
        if (mlap_has(d, device, mps))
            return d;
        if (!gpu && strncmp(d->name, "GPU-", 4) == 0)
            gpu = d;
    }
    return gpu;
}

static void set(const char *variable, const char *value)
{
    if (value ? setenv(variable, value, 1) : unsetenv(variable))
        abort(); /* no memory */
}

/* Where there is no MPS to join. */
static int refuse(const struct ctl *ctl, const struct mlap_device *device)
{
    if (!device)
        return ctl_error(ctl, CTL_FAILED, "mlad serves no GPU, so there is no MPS to join; --without-mps starts %s all "
                         "the same", ctl->words[0]);
    if (device->state == MLAP_device_state_READY || device->state == MLAP_device_state_DRAINING)
        return ctl_error(ctl, CTL_FAILED, "the worker of %s is not under MPS: start the control daemon "
                         "(mlad-mps.service, or nvidia-cuda-mps-control -d) before mlad, with one "
                         "CUDA_MPS_PIPE_DIRECTORY for both; `mlactl doctor` says more, --without-mps starts %s all the "
                         "same", device->name, ctl->words[0]);
    return ctl_error(ctl, CTL_FAILED, "%s is %s, so that its worker's MPS is not known%s%s; try again", device->name,
                     mlap_device_state_text(device->state), *device->reason ? ": " : "", device->reason);
}

int ctl_engine(const struct ctl *ctl)
{
    ctl_autofree struct mlap_status_reply *status = NULL;
    struct ctl_fault fault;
    {
        admin_auto struct admin *admin = NULL;
        int code = admin_new(ctl, &admin, &fault);
        if (!code)
            code = admin_status(admin, &status, &fault);
        if (code)
            return ctl_error(ctl, code, "%s", fault.text);
    }
    const char *name = ctl_value(ctl, "--device");
    const struct mlap_device *device = choose(status, name);
    if (name && !device)
        return ctl_error(ctl, CTL_FAILED, "no device %s is served here", name);
    if (device && mlap_has(device, device, mps)) {
        set("CUDA_MPS_PIPE_DIRECTORY", device->mps);
        set("CUDA_MPS_LOG_DIRECTORY", mlap_has(device, device, mps_log) ? device->mps_log : NULL);
    } else if (!ctl_value(ctl, "--without-mps")) {
        return refuse(ctl, device);
    }
    if (strcmp(ctl->socket, CTL_SOCKET) != 0)
        set("MLAD_SOCKET", ctl->socket);
    if (name)
        set("MLAD_DEVICE", name);
    execvp(ctl->words[0], ctl->words);
    return ctl_error(ctl, CTL_FAILED, "%s cannot be started: %s", ctl->words[0], strerror(errno));
}
