/* test_device.h - the device that a test program runs on: `PROGRAM backend [variant]`. */
#ifndef TEST_DEVICE_H
#define TEST_DEVICE_H

#include "oracle.h"

/* The backends that the program can be told to use: test_backend.c, or another file of its own. NULL: no such. */
const struct mlak_backend *test_backend(const char *name);

/* Open it with two threads. Exits with 77 (skipped) when this machine lacks the variant. */
void test_device_open(int argc, char **argv);
void test_device_close(void);
bool test_device_exact(void);                   /* fp64, which rounds nothing but the outputs */
struct oracle_bar test_device_bar(enum mlak_dtype q_dtype);
bool test_device_takes_rows(void);              /* else whole batches only: no test_device_launch */
enum mlak_code test_device_launch(struct mlak_row *rows, uint32_t count);
enum mlak_code test_device_check(const struct mlak_batch *batch, struct mlak_fault *fault);

/* Outputs filled with 0xff (NaN), then check, prepare and launch of a whole batch. `rows` has room for its requests.
 * Fails the running cmocka test if the check refuses it. MLAK_OK or MLAK_BATCH. */
enum mlak_code test_device_decode(struct made *made, struct mlak_row *rows, struct mlak_fault *fault);

/* test_device_decode that must be MLAK_OK and write nothing but the outputs. */
void test_device_run(struct made *made, struct mlak_row *rows);

/* test_device_decode of made[0..count) in one launch: rows[i] and codes[i] are made[i]'s, whose first row may be
 * MLAK_ROW_CANCELLED before: then nobody wants it, and all its rows must be. */
void test_device_decode_together(struct made *const *made, uint32_t count, struct mlak_row *const *rows,
                                 enum mlak_code *codes);

/* The same `times` times, 1 or more, in the same memory of the device. after(context, time), time from 0 on, finds the
 * outputs of each, unless it is NULL; and all tensors, as the device has left them, after the last one. */
void test_device_decode_again(struct made *const *made, uint32_t count, struct mlak_row *const *rows,
                              enum mlak_code *codes, unsigned times, void (*after)(void *context, unsigned time),
                              void *context);

/* The layers of a step: made[0..count), which have equal lengths, masks and tables, and those in the memory of the
 * first one; their buffers differ. What a launch after the first reads of lengths and masks is wrong by then. Only on
 * a device with memory of its own (test_device_captures). */
void test_device_decode_step(struct made *const *made, uint32_t count, struct mlak_row *rows);

/* Every request that did not fail holds against the oracle; `failed` is how many may. `rows` NULL: none did. */
void test_device_judge(struct made *made, const struct mlak_row *rows, uint32_t failed, const char *what);

/* Both of a batch. */
void test_device_assert_right(struct made *made, uint32_t failed, const char *what);

/* The launches of batches, captured on a device that can (test_device_captures). A graph has memory for their tensors,
 * and may be replayed with the contents of other batches, of the same descriptors. Fails the running cmocka test if the
 * device refuses. */
struct test_graph;
bool test_device_captures(void);
struct test_graph *test_graph_new(struct made *const *made, uint32_t count);
/* As test_device_decode of made[0..count): what is returned, and `rows`, are the last one's. */
enum mlak_code test_graph_replay(struct test_graph *graph, struct made *const *made, struct mlak_row *rows,
                                 struct mlak_fault *fault);
void test_graph_free(struct test_graph *graph);

#endif
