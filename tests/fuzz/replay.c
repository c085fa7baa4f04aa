/* replay.c - stands in for libFuzzer: run a fuzz target once over each file of the folders given. */
#include "fuzz.h"

#include <fts.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>

static int run_file(const char *path, size_t size)
{
    FILE *file = fopen(path, "rb");
    uint8_t *data = malloc(size + (size == 0));
    if (file == NULL || data == NULL || fread(data, 1, size, file) != size) {
        perror(path);
        return 1;
    }
    fclose(file);
    LLVMFuzzerTestOneInput(data, size);
    free(data);
    return 0;
}

int main(int count, char **folders)
{
    unsigned files = 0;
    FTS *tree = count > 1 ? fts_open(folders + 1, FTS_PHYSICAL, NULL) : NULL;
    for (FTSENT *entry; tree != NULL && (entry = fts_read(tree)) != NULL;) {
        if (entry->fts_info != FTS_F)
            continue;
        if (run_file(entry->fts_accpath, (size_t)entry->fts_statp->st_size) != 0)
            return 1;
        files++;
    }
    if (tree != NULL)
        fts_close(tree);
    printf("%u inputs\n", files);
    return files == 0;
}
