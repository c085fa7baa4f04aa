/* gpu.h - memory of a GPU that mlactl allocates for itself, and a stream, as an engine would, so that a capture goes
 * the way a client's batch does. The driver is found at run time; one GPU a process is enough here.
 *
 * Copies are synchronous: when one returns, the data has arrived. Not for several threads at once. */
#ifndef MLACTL_GPU_H
#define MLACTL_GPU_H

#include "mla.h"

#include <stdbool.h>

/* Is it the name of a GPU ("GPU-...")? */
bool gpu_named(const char *device);

/* `bytes` of memory on the GPU of that UUID; NULL with `error`. The caller's until gpu_free. */
void *gpu_alloc(const char *device, size_t bytes, mla_error *error);
void gpu_free(void *pointer);

/* 0, or -1 with `error`. */
int gpu_upload(void *to, const void *from, size_t bytes, mla_error *error);
int gpu_download(void *to, const void *from, size_t bytes, mla_error *error);

/* A stream on the GPU of that UUID; NULL with `error`. The caller's until gpu_stream_free. */
void *gpu_stream_new(const char *device, mla_error *error);
void gpu_stream_free(void *stream);

/* What is put into the stream between these two becomes a graph and does not run: *graph is the caller's until
 * gpu_graph_free, NULL if that failed. Each 0, or -1 with `error`; end ends the capture either way. */
int gpu_capture_begin(void *stream, mla_error *error);
int gpu_capture_end(void *stream, void **graph, mla_error *error);
/* Put the graph's work into the stream. 0, or -1 with `error`. */
int gpu_graph_launch(void *graph, void *stream, mla_error *error);
void gpu_graph_free(void *graph);

#endif
