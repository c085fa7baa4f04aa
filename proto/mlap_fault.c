/* mlap_fault.c - errors as code, field and sentence, and the text rule of the protocol (UTF-8 without NUL).
 * A fault belongs to whoever declared it; nothing is kept here. */
#include "mlap_tables.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* Length of the UTF-8 sequence at `at`, 0 if there is none: overlong forms, surrogates and NUL are none. */
static size_t utf8_step(const unsigned char *at, size_t left)
{
    if (at[0] < 0x80)
        return at[0] != 0;
    static const struct { unsigned char first_low, first_high, second_low, second_high; size_t length; } forms[] = {
        {0xC2, 0xDF, 0x80, 0xBF, 2},
        {0xE0, 0xE0, 0xA0, 0xBF, 3}, {0xE1, 0xEC, 0x80, 0xBF, 3},
        {0xED, 0xED, 0x80, 0x9F, 3}, {0xEE, 0xEF, 0x80, 0xBF, 3},
        {0xF0, 0xF0, 0x90, 0xBF, 4}, {0xF1, 0xF3, 0x80, 0xBF, 4}, {0xF4, 0xF4, 0x80, 0x8F, 4},
    };
    for (size_t i = 0; i < sizeof forms / sizeof forms[0]; i++) {
        if (at[0] < forms[i].first_low || at[0] > forms[i].first_high)
            continue;
        if (left < forms[i].length || at[1] < forms[i].second_low || at[1] > forms[i].second_high)
            return 0;
        for (size_t k = 2; k < forms[i].length; k++)
            if ((at[k] & 0xC0) != 0x80)
                return 0;
        return forms[i].length;
    }
    return 0;
}

bool mlap_is_text(const char *bytes, size_t length)
{
    const unsigned char *at = (const unsigned char *)bytes;
    for (size_t step; length > 0; at += step, length -= step) {
        step = utf8_step(at, length);
        if (step == 0)
            return false;
    }
    return true;
}

/* A fault is sent to the peer: whatever was quoted in it, or cut through, becomes printable text. */
static void make_text(char *string)
{
    unsigned char *at = (unsigned char *)string;
    for (size_t left = strlen(string); left > 0;) {
        size_t step = utf8_step(at, left);
        if (step == 0 || *at < 0x20 || *at == 0x7F) {
            *at = '?';
            step = 1;
        }
        at += step;
        left -= step;
    }
}

enum mlap_code mlap_fail(struct mlap_fault *fault, enum mlap_code code, const char *field, const char *format, ...)
{
    if (fault == NULL)
        return code;
    fault->code = code;
    snprintf(fault->field, sizeof fault->field, "%s", field);
    make_text(fault->field);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(fault->message, sizeof fault->message, format, arguments);
    va_end(arguments);
    make_text(fault->message);
    return code;
}
