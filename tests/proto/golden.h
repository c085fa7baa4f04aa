/* golden.h - what each message must look like on the wire. */
#ifndef GOLDEN_H
#define GOLDEN_H

#include "mlap.h"

struct golden {
    enum mlap_type type;
    uint32_t sequence;
    const void *body;
    size_t size;              /* of the struct */
    const char *notation;     /* the wire's bytes, for golden_bytes */
};
extern const struct golden golden[];
extern const size_t n_golden;

/* "94 01 0a 'plan'" to bytes: hexadecimal, and text between quotes as it is. Returns their number. */
size_t golden_bytes(const char *notation, unsigned char bytes[MLAP_MAX_MESSAGE]);

#endif
