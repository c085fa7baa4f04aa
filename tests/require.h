/* require.h - checks that end a test program which is a process of its own, with the line and the reason. */
#ifndef REQUIRE_H
#define REQUIRE_H

#include <stdio.h>
#include <stdlib.h>

#define REQUIRE(condition, why)                                                                                        \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%d: %s: %s\n", __LINE__, #condition, why);                                                \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

#endif
