/* Message schemas: whatever decodes must encode, and decode to the same again; whatever does not must be tellable. */
#include "fuzz.h"
#include "mlap.h"

#include <stdlib.h>
#include <string.h>

static void require(int condition)
{
    if (!condition)
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static union mlap_body first, second;
    static char bytes[MLAP_MAX_MESSAGE];
    struct mlap_header header, header_again;
    struct mlap_fault fault;
    memset(&first, 0, sizeof first);
    enum mlap_code code = mlap_decode(data, size, &header, &first, &fault);
    if (code != MLAP_code_OK) {
        struct mlap_error error = {.code = fault.code};
        memcpy(error.field, fault.field, sizeof error.field);
        memcpy(error.message, fault.message, sizeof error.message);
        require(fault.code == code && mlap_encode(bytes, sizeof bytes, MLAP_ERROR, header.sequence, &error) > 0);
        return 0;
    }
    long length = mlap_encode(bytes, sizeof bytes, header.type, header.sequence, &first);
    require(length > 0);
    memset(&second, 0, sizeof second);
    require(mlap_decode(bytes, (size_t)length, &header_again, &second, NULL) == MLAP_code_OK);
    require(memcmp(&header, &header_again, sizeof header) == 0 && memcmp(&first, &second, sizeof first) == 0);
    return 0;
}
