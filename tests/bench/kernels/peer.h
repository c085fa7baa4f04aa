/* peer.h - what a library must export for mlad-kernel-compare to time its kernel beside ours: --peer FILE.so.
 *
 * The library exports one function, `mlad_peer`, that returns a table which lives as long as the library. For each
 * shape the program calls open once, then prepare and enqueue any number of times, then close; all from one thread, on
 * which the primary context of the GPU is current. Errors: NULL is success, else a sentence that stays valid until the
 * next call.
 *
 * A shape is several decodes that differ in `kv` alone, as those of a model's layers do in one step. What depends on
 * the lengths only, and so is done once a step, belongs into prepare: it is timed apart from the decodes.
 *
 * prepare and enqueue are captured into CUDA graphs: they put work on `stream` and on no other, allocate nothing and do
 * not wait. A decode runs after all that was put on the stream before it, the last prepare among it. Whatever memory
 * they need is taken in open. Programmatic dependent launch is welcome within a call; calls are joined by full edges.
 *
 * To build one: -shared -fPIC, the CUDA runtime linked statically (-cudart static), so that it needs no more than the
 * driver where it is used. */
#ifndef MLAD_PEER_H
#define MLAD_PEER_H

#include <stdint.h>

enum { MLAD_PEER_ABI = 1 };

struct CUstream_st; /* a CUstream or cudaStream_t points to one */

/* One decode: causal, bf16, MLA's 576 = 512 + 64. Pointers are the GPU's, 256-byte aligned, and stay the program's.
 * Query token t of request b sees the keys 0 .. seqlens[b] - q_len + t; every token sees one at least. */
struct mlad_peer_batch {
    uint32_t batch, heads, q_len;
    uint32_t pages, page_size, max_pages;
    float softmax_scale;
    const void *q;              /* bf16 [batch, q_len, heads, 576] */
    const void *kv;             /* bf16 [pages, page_size, 576]: 512 of which are the values too */
    const int32_t *block_table; /* [batch, max_pages]; entries beyond a request's length are 0 */
    const int32_t *seqlens;     /* [batch] */
    void *out;                  /* bf16 [batch, q_len, heads, 512] */
    float *lse;                 /* [batch, q_len, heads], natural logarithm */
};

struct mlad_peer {
    int abi;          /* MLAD_PEER_ABI */
    const char *name; /* "FlashMLA 9241ae3" */
    /* batches: [count], copied if need be. On success *self is the library's own, for the calls below. A shape that the
     * kernel does not do is an error; the program goes on with the next. */
    const char *(*open)(const struct mlad_peer_batch *batches, uint32_t count, void **self);
    const char *(*prepare)(void *self, struct CUstream_st *stream);
    const char *(*enqueue)(void *self, uint32_t batch, struct CUstream_st *stream);
    void (*close)(void *self);
};

/* The exported symbol. */
const struct mlad_peer *mlad_peer(void);
typedef const struct mlad_peer *mlad_peer_function(void);

#endif
