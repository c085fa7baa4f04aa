/* test_backend.c - the backends of this build, for test programs that want no other. */
#include "test_device.h"

const struct mlak_backend *test_backend(const char *name) { return mlak_backend(name); }
