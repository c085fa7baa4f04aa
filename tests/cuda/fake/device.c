/* device.c - devices and contexts of the fake driver. Contexts are the eight primary ones; they live for ever. */
#include "fake_cuda.h"

#include <dlfcn.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

static struct fake_context contexts[FAKE_DEVICES];
static atomic_bool initialised;
static _Thread_local CUcontext stack[16];
static _Thread_local int depth; /* stack[depth - 1] is current */

int fake_current_device(void) { return depth && stack[depth - 1] ? stack[depth - 1]->device : -1; }
CUcontext fake_context_of(int device) { return device >= 0 && device < FAKE_DEVICES ? &contexts[device] : NULL; }
static bool is_device(CUdevice d) { return atomic_load(&initialised) && d >= 0 && d < fake_settings().devices; }

API(cuInit, (unsigned flags), (flags))
{
    if (flags) return FAKE_INVALID_VALUE;
    if (fake_settings().no_device) return FAKE_NO_DEVICE;
    for (int i = 0; i < FAKE_DEVICES && !atomic_load(&initialised); i++) contexts[i].device = i;
    atomic_store(&initialised, true);
    return FAKE_OK;
}
API(cuDriverGetVersion, (int *version), (version))
{
    return version ? (*version = 13000, FAKE_OK) : FAKE_INVALID_VALUE;
}

static const struct { CUresult code; const char *name, *text; } errors[] = {
    {0, "CUDA_SUCCESS", "no error"}, {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"}, {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {205, "CUDA_ERROR_MAP_FAILED", "mapping of buffer object failed"},
    {400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {401, "CUDA_ERROR_ILLEGAL_STATE", "the operation cannot be performed in the present state"},
    {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {600, "CUDA_ERROR_NOT_READY", "device not ready"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {704, "CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED", "peer access is already enabled"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {801, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"},
    {908, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD",
     "attempt to terminate a thread-local capture sequence from another thread"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"}};
static CUresult error_text(CUresult e, const char **out, bool name)
{
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].code == e) return *out = name ? errors[i].name : errors[i].text, FAKE_OK;
    *out = NULL;
    return FAKE_INVALID_VALUE;
}
API(cuGetErrorName, (CUresult e, const char **out), (e, out)) { return error_text(e, out, true); }
API(cuGetErrorString, (CUresult e, const char **out), (e, out)) { return error_text(e, out, false); }

API(cuDeviceGetCount, (int *n), (n))
{
    if (!atomic_load(&initialised)) return FAKE_NOT_INITIALIZED;
    return *n = fake_settings().devices, FAKE_OK;
}
API(cuDeviceGet, (CUdevice *out, int ordinal), (out, ordinal))
{
    if (!atomic_load(&initialised)) return FAKE_NOT_INITIALIZED;
    return is_device(ordinal) ? (*out = ordinal, FAKE_OK) : FAKE_INVALID_DEVICE;
}
API(cuDeviceGetName, (char *name, int len, CUdevice d), (name, len, d))
{
    return is_device(d) ? (snprintf(name, (size_t)len, "Fake GPU %d", d), FAKE_OK) : FAKE_INVALID_DEVICE;
}
/* GPU-fa4e0000-0000-4000-8000-00000000000K */
API(cuDeviceGetUuid_v2, (CUuuid *out, CUdevice d), (out, d))
{
    static const unsigned char uuid[16] = {0xfa, 0x4e, 0, 0, 0, 0, 0x40, 0, 0x80};
    if (!is_device(d)) return FAKE_INVALID_DEVICE;
    memcpy(out, uuid, sizeof uuid);
    out->bytes[15] = (char)d;
    return FAKE_OK;
}
API(cuDeviceGetUuid, (CUuuid *out, CUdevice d), (out, d)) { return do_cuDeviceGetUuid_v2(out, d); }
API(cuDeviceTotalMem_v2, (size_t *bytes, CUdevice d), (bytes, d))
{
    return is_device(d) ? (*bytes = fake_settings().memory, FAKE_OK) : FAKE_INVALID_DEVICE;
}
API(cuDeviceGetAttribute, (int *out, int attribute, CUdevice d), (out, attribute, d))
{
    static const int values[148] = {[1] = 1024, [2] = 1024, [3] = 1024, [4] = 64, [5] = 2147483647, [6] = 65535,
        [7] = 65535, [8] = 49152, [10] = 32, [12] = 65536, [13] = 1980000, [19] = 1, [31] = 1,
        [38] = 52428800, [39] = 2048, [40] = 3, [41] = 1, [78] = 1, [81] = 233472, [82] = 65536, [90] = 1, [91] = 1,
        [95] = 1, [99] = 1, [102] = 1, [103] = 1, [106] = 32, [111] = 1024, [115] = 1, [119] = 1};
    struct fake_settings set = fake_settings();
    if (!is_device(d)) return FAKE_INVALID_DEVICE;
    if (attribute < 1 || attribute >= 148) return FAKE_INVALID_VALUE;
    *out = attribute == 75 ? set.major : attribute == 76 ? set.minor : attribute == 97 ? set.smem
         : attribute == 16 ? set.processors : attribute == 33 ? d + 1 : attribute == 133 ? set.mps : values[attribute];
    return FAKE_OK;
}
API(cuDeviceCanAccessPeer, (int *can, CUdevice a, CUdevice b), (can, a, b))
{
    return is_device(a) && is_device(b) ? (*can = a != b && fake_settings().peer, FAKE_OK) : FAKE_INVALID_DEVICE;
}
API(cuDevicePrimaryCtxRetain, (CUcontext *out, CUdevice d), (out, d))
{
    return is_device(d) ? (*out = &contexts[d], FAKE_OK) : FAKE_INVALID_DEVICE;
}
API(cuDevicePrimaryCtxRelease_v2, (CUdevice d), (d)) { return is_device(d) ? FAKE_OK : FAKE_INVALID_DEVICE; }
API(cuCtxSetCurrent, (CUcontext c), (c)) { return depth = depth ? depth : 1, stack[depth - 1] = c, FAKE_OK; }
API(cuCtxGetCurrent, (CUcontext *c), (c)) { return *c = depth ? stack[depth - 1] : NULL, FAKE_OK; }
API(cuCtxPushCurrent_v2, (CUcontext c), (c)) { return depth < 16 ? (stack[depth++] = c, FAKE_OK) : FAKE_INVALID_VALUE; }
API(cuCtxPopCurrent_v2, (CUcontext *c), (c))
{
    if (!depth) return FAKE_INVALID_CONTEXT;
    depth--;
    if (c) *c = stack[depth];
    return FAKE_OK;
}
API(cuCtxGetDevice, (CUdevice *d), (d))
{
    return fake_current_device() < 0 ? FAKE_INVALID_CONTEXT : (*d = fake_current_device(), FAKE_OK);
}
API(cuCtxSynchronize, (void), ()) { return fake_current_device() < 0 ? FAKE_INVALID_CONTEXT : fake_sync_all(); }
API(cuCtxEnablePeerAccess, (CUcontext peer, unsigned flags), (peer, flags))
{
    return !peer || flags ? FAKE_INVALID_VALUE : fake_settings().peer ? FAKE_OK : FAKE_PEER_UNSUPPORTED;
}
API(cuGetProcAddress_v2, (const char *name, void **out, int version, uint64_t flags, int *status),
    (name, out, version, flags, status))
{
    char versioned[128];
    Dl_info self;
    if (!dladdr((void *)(uintptr_t)&errors, &self)) return FAKE_UNKNOWN;
    void *library = dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    snprintf(versioned, sizeof versioned, "%s_v2", name);
    *out = library ? dlsym(library, versioned) : NULL;
    if (library && !*out) *out = dlsym(library, name);
    if (library) dlclose(library);
    (void)version, (void)flags;
    if (status) *status = *out ? 0 : 1;
    return *out ? FAKE_OK : FAKE_NOT_FOUND;
}
