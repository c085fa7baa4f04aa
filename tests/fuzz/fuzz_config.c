/* fuzz_config.c - any text as a configuration file: it is refused with one sentence, or what is printed of it reads the
 * same. */
#include "config.h"

#include "fuzz.h"

#include <stdlib.h>
#include <string.h>

static struct mlad_config config, again;

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char error[MLAD_CONFIG_ERROR] = "";
    if (!mlad_config_load(&config, NULL, false, NULL, 0, error))
        abort();
    if (!mlad_config_parse(&config, (const char *)data, size, "fuzz", error)) {
        if (strncmp(error, "fuzz:", 5) != 0 || strchr(error, '\n'))
            abort();
        return 0;
    }
    char *text = NULL;
    size_t length = 0;
    FILE *to = open_memstream(&text, &length);
    mlad_config_print(&config, to);
    fclose(to);
    if (!mlad_config_load(&again, NULL, false, NULL, 0, error) ||
        !mlad_config_parse(&again, text, length, "printed", error) || memcmp(&config, &again, sizeof config) != 0)
        abort();
    free(text);
    return 0;
}
