/* Capture files: arbitrary bytes as a file through capture_read; what it accepts must be readable to the last byte. */
#include "capture.h"
#include "fuzz.h"

#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    int fd = memfd_create("capture", MFD_CLOEXEC);
    struct capture *capture = NULL;
    struct ctl_fault fault;
    if (fd < 0 || write(fd, data, size) != (ssize_t)size)
        abort();
    if (capture_read(fd, &capture, &fault) < 0) /* takes fd over */
        return 0;
    for (unsigned i = 0; i < CAPTURE_TENSORS; i++) {
        const struct capture_data *tensor = &capture->data[i];
        if (!tensor->present)
            continue;
        if (tensor->bytes > size || tensor->offset > size - tensor->bytes)
            abort();
        void *copy = malloc(tensor->bytes + 1);
        if (!copy || capture_load(capture, (enum capture_tensor)i, copy, &fault) < 0)
            abort();
        free(copy);
    }
    capture_free(capture);
    return 0;
}
