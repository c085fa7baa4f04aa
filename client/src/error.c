/* error.c - the one error type: a code, the field at fault, one sentence. It belongs to whoever passed it in. */
#include "mlac.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* Public codes are the protocol's, so that an ERROR message is an mla_error. */
#define SAME(NAME) _Static_assert((int)MLA_##NAME == (int)MLAP_code_##NAME, "one numbering of errors");
SAME(OK) SAME(VERSION) SAME(MALFORMED) SAME(UNKNOWN_TYPE) SAME(UNKNOWN_FIELD) SAME(MISSING_FIELD) SAME(INVALID)
SAME(FDS) SAME(STATE) SAME(DENIED) SAME(NO_DEVICE) SAME(UNAVAILABLE) SAME(DRAINING) SAME(EVICTED) SAME(QUOTA) SAME(BUSY)
SAME(MEMORY) SAME(BUFFER) SAME(EXISTS) SAME(NOT_FOUND) SAME(IN_USE) SAME(RANGE) SAME(OVERLAP) SAME(UNSUPPORTED)
SAME(BATCH) SAME(REQUESTS) SAME(TIMEOUT) SAME(DEVICE_LOST) SAME(WORKER_LOST) SAME(NOT_CONNECTED) SAME(INTERNAL)
_Static_assert(MLA_INTERNAL + 1 == MLAP_code_COUNT, "every code of the protocol is public");
_Static_assert(sizeof((mla_error *)0)->field == sizeof((struct mlap_error *)0)->field, "an ERROR's field fits");
_Static_assert(sizeof((mla_error *)0)->message == sizeof((struct mlap_error *)0)->message, "an ERROR's message fits");

mla_status mlac_fail(mla_error *error, mla_status code, const char *field, const char *format, ...)
{
    if (error) {
        error->code = code;
        snprintf(error->field, sizeof error->field, "%s", field);
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(error->message, sizeof error->message, format, arguments);
        va_end(arguments);
    }
    return code;
}

mla_status mlac_report(mla_error *error, const mla_error *what)
{
    if (error && what->code != MLA_OK)
        *error = *what;
    return what->code;
}

MLA_API const char *mla_status_text(mla_status code)
{
    if ((int)code < 0 || (int)code >= MLAP_code_COUNT)
        return "unknown";
    return mlap_code_text((enum mlap_code)code);
}

MLA_API const char *mla_version(void)
{
    return MLAD_VERSION_TEXT;
}
