/* placement_client.c - a client that says which placement libmla sees, then waits for the end of its input, so that the
 * daemon's view can be read meanwhile.
 *
 * usage: placement-client host | context ORDINAL | memory ORDINAL..., with MLAD_SOCKET, MLAD_DEVICE and a libcuda.so.1
 *     context: a context is current when it connects; memory: it connects first, then registers memory on each GPU */
#include "gpu_client.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main(int argc, char **argv)
{
    static const char *const names[] = {"shared_mps", "own_gpu", "shared_timesliced", "host"};
    const char *when = argc > 1 ? argv[1] : "";
    mla_client *client;
    mla_error error;
    char why[MLA_WHY];
    if (strcmp(when, "context") == 0 && argc > 2)
        use_gpu(atoi(argv[2]));
    REQUIRE(mla_connect(&client, NULL, &error) == MLA_OK, error.message);
    for (int i = 2; strcmp(when, "memory") == 0 && i < argc; i++) {
        CUdeviceptr pointer;
        mla_buffer *buffer;
        use_gpu(atoi(argv[i]));
        CU(cuMemAlloc_v2, (CUdeviceptr *, size_t), &pointer, 4096);
        REQUIRE(mla_buffer_import_device(client, (void *)(uintptr_t)pointer, 4096, MLA_READ, &buffer, &error) == MLA_OK,
                error.message);
    }
    printf("%s: ", names[mla_client_placement(client, why)]);
    REQUIRE(mla_client_placement(client, NULL) <= MLA_PLACEMENT_HOST, "a placement");
    printf("%s\n", why);
    fflush(stdout);
    while (getchar() != EOF)
        ;
    mla_close(client);
    return 0;
}
