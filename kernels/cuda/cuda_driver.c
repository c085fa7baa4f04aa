/* cuda_driver.c - see cuda_driver.h. */
#include "cuda_driver.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

static struct {
    struct mlak_driver functions;
    struct mlak_fault fault; /* code MLAK_OK: the driver is there */
} driver;

/* The driver's own name for a member of the table, which is what its documentation and our users know. */
static const char *symbol_of(const char *call)
{
#define NAME(member, symbol, parameters)                                                                               \
    if (strcmp(call, #member) == 0)                                                                                    \
        return #symbol;
    MLAK_DRIVER(NAME)
#undef NAME
    return call;
}

enum mlak_code mlak_driver_fail(struct mlak_fault *fault, enum mlak_code code, const char *field, const char *call,
                                CUresult result)
{
    const char *name = "unknown error", *text = "the driver does not say what";
    if (driver.functions.error_name)
        driver.functions.error_name(result, &name);
    if (driver.functions.error_text)
        driver.functions.error_text(result, &text);
    return mlak_fail(fault, code, field, "%s: %s (%s, %d)", symbol_of(call), text ? text : "?", name ? name : "?",
                     (int)result);
}

static void load(void)
{
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        mlak_fail(&driver.fault, MLAK_UNSUPPORTED, "device",
                  "no NVIDIA driver is installed here, or not for this process: %s", dlerror());
        return;
    }
    const char *missing = NULL;
#define FIND(member, symbol, parameters)                                                                               \
    *(void **)(void *)&driver.functions.member = dlsym(library, #symbol);                                              \
    if (!driver.functions.member)                                                                                      \
        missing = #symbol;
    MLAK_DRIVER(FIND)
#undef FIND
    if (missing) {
        mlak_fail(&driver.fault, MLAK_UNSUPPORTED, "device", "the NVIDIA driver lacks %s; install a newer one",
                  missing);
        return;
    }
    CUresult result = driver.functions.init(0);
    if (result != CUDA_SUCCESS)
        mlak_driver_fail(&driver.fault, MLAK_UNSUPPORTED, "device", "cuInit", result);
}

const struct mlak_driver *mlak_driver(struct mlak_fault *fault)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, load);
    if (driver.fault.code == MLAK_OK)
        return &driver.functions;
    if (fault)
        *fault = driver.fault;
    return NULL;
}

void mlak_uuid_text(const CUuuid *uuid, char text[MLAK_UUID_TEXT])
{
    int length = snprintf(text, MLAK_UUID_TEXT, "GPU-");
    for (int i = 0; i < 16; i++)
        length += snprintf(text + length, (size_t)(MLAK_UUID_TEXT - length), "%s%02x",
                           i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "", (unsigned char)uuid->bytes[i]);
}

uint32_t mlak_gpus(struct mlak_gpu *gpus, uint32_t most, struct mlak_fault *why)
{
    const struct mlak_driver *cu = mlak_driver(why);
    int count = 0;
    uint32_t found = 0;
    if (!cu)
        return 0;
    CUresult result = cu->device_count(&count);
    if (result != CUDA_SUCCESS) {
        mlak_driver_fail(why, MLAK_UNSUPPORTED, "device", "device_count", result);
        return 0;
    }
    for (int i = 0; i < count && found < most; i++) {
        CUdevice device;
        CUuuid uuid;
        char text[MLAK_UUID_TEXT];
        struct mlak_gpu *gpu = &gpus[found];
        if ((result = cu->device_get(&device, i)) != CUDA_SUCCESS ||
            (result = cu->device_uuid(&uuid, device)) != CUDA_SUCCESS)
            continue;
        mlak_uuid_text(&uuid, text);
        snprintf(gpu->device, sizeof gpu->device, "%s", text);
        if (cu->device_name(gpu->model, sizeof gpu->model, device) != CUDA_SUCCESS)
            snprintf(gpu->model, sizeof gpu->model, "unnamed");
        found++;
    }
    if (found == 0 && count == 0)
        mlak_fail(why, MLAK_UNSUPPORTED, "device", "the NVIDIA driver sees no GPU");
    else if (found == 0)
        mlak_driver_fail(why, MLAK_UNSUPPORTED, "device", "device_uuid", result);
    return found;
}
