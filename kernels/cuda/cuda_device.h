/* cuda_device.h - a GPU as its parts see it: cuda_backend.c, which opens it; cuda_launch.c, which launches batches;
 * cuda_graph.c, which captures launches; cuda_ordered.c, whose launches follow a client's stream.
 *
 * A launch has a room for itself, so that launches in different rooms may run at once, each called from a thread of its
 * own. Of one room, calls come from one thread at a time; of the device, what launches do not change is written while
 * none runs, and the rest by __atomic_* or under a lock. */
#ifndef MLAK_CUDA_DEVICE_H
#define MLAK_CUDA_DEVICE_H

#include "cuda_memory.h"
#include "mlak_backends.h"
#include "mlak_cuda.h"

#include <pthread.h>

enum { CUDA_LAUNCHES = 2 }; /* of launch_batches at once */

/* Requests [first, first + count) of a part's batch. */
struct cuda_slice {
    const struct mlak_batch *batch;
    uint32_t first, count;
    struct mlak_row *rows;
    struct mlak_part *part;
};

/* What a launch has for itself. */
struct cuda_room {
    CUstream stream;
    struct mlak_cuda_job job; /* the scratch, in device memory, and max_slots; ticket: of the launch made last */
    /* In a lane's room all of the rest is empty: its results lie in device memory, and no thread waits for them. */
    struct mlak_cuda_result *result;          /* pinned, as `job` has it */
    struct mlak_cuda_row_result *row_results; /* pinned, [MLAK_CUDA_MAX_REQUESTS] */
    struct mlak_cuda_source *staged;          /* pinned, [MLAK_CUDA_MAX_SOURCES]: on their way to job.sources */
    uint64_t *cancelled;                      /* pinned, [MLAK_CUDA_MAX_SOURCES]: of each source, the ticket of the
                                               * launch that was given up last */
    struct mlak_cuda_source *prepared;        /* [MLAK_CUDA_MAX_SOURCES]: what the scratch was prepared for last; */
    uint32_t n_prepared;                      /* 0: for nothing that anybody may count on */
    unsigned prepared_grid;                   /* for so many thread blocks */
    uint64_t progress_seen;
    uint64_t began; /* by __atomic_*: the number of the launch that runs here, of all of the device's; 0: none */
};

struct mlak_device {
    const struct mlak_driver *cu;
    CUdevice gpu;
    CUcontext context;
    CUmodule module;
    CUfunction prepare, combine, split[MLAK_CUDA_TYPES];
    CUfunction wide[MLAK_CUDA_TYPES]; /* NULL without the room */
    bool wgmma;                       /* it is Hopper, and its own kernels are wanted */
    CUfunction split_wgmma[MLAK_CUDA_WGMMA_TYPES];
    bool early; /* kernels can start before the one before them has ended, and wait for it */
    CUstream control; /* what overtakes launches */
    CUevent sign;     /* of life, on `control` */
    unsigned split_grid, combine_grid, split_shared, most_shared;
    uint32_t max_slots; /* of each room */
    struct cuda_memory memory;
    bool memory_ready;
    struct cuda_room rooms[CUDA_LAUNCHES];
    uint64_t begun;     /* launches so far, by __atomic_* */
    uint64_t *progress; /* NULL, or the caller's, by __atomic_* */
    struct cuda_ordered *ordered; /* cuda_ordered.c's; NULL until a lane is asked for */
    uint32_t waiting; /* lanes with launches in flight, whose gates may hold a processor each; by __atomic_* */
    struct mlak_capability capabilities[MLAK_CONTRACT_ROWS];
    pthread_mutex_t losing; /* of who writes `lost`, once */
    char lost[256];
    bool is_lost; /* by __atomic_*: then `lost` says why */
};

/* Take the room's memory and stream; `awaited`: its launches are waited for by the host. As the driver answers to
 * `call`; what was taken then is cuda_room_close's, which forgives what is not there. Nothing waits for the device. */
CUresult cuda_room_open(const struct mlak_device *device, struct cuda_room *room, bool awaited, const char **call);
void cuda_room_close(const struct mlak_device *device, struct cuda_room *room);

/* Make the device's context current. MLAK_OK or MLAK_LOST, now or long ago. */
enum mlak_code cuda_enter(struct mlak_device *device, struct mlak_fault *fault);

/* MLAK_LOST from now on: `call`, a member of struct mlak_driver or other words, answered `result`. From any thread; the
 * first one's word is kept. */
enum mlak_code cuda_lose(struct mlak_device *device, const char *call, CUresult result, struct mlak_fault *fault);

/* Wait until nothing is left on the room's stream: what runs names memory that the caller may unmap. */
CUresult cuda_settle(const struct mlak_device *device, struct cuda_room *room);

/* The driver refused a call for the room: cuda_settle, for what it had taken before, then MLAK_MEMORY or MLAK_LOST. */
enum mlak_code cuda_refused(struct mlak_device *device, struct cuda_room *room, const char *call, CUresult result,
                            struct mlak_fault *fault);

/* Requests of such a batch that one launch takes. */
uint32_t cuda_most_requests(const struct mlak_device *device, const struct mlak_batch *batch);

/* Kernels that wait for a flag now, each on a processor that it may hold. */
uint32_t cuda_gates(const struct mlak_device *device);

/* A launch in the room of slices[0..count), as many as one takes, mergeable, in order; in a lane's room, of one. On the
 * processors that `gates` gates leave it. */
struct mlak_cuda_job cuda_job(const struct mlak_device *device, struct cuda_room *room, uint32_t gates,
                              const struct cuda_slice *slices, uint32_t count);

/* Let the job's layer use what is prepared, if that was for a layer of the same step. True: it does. */
bool cuda_follow(const struct cuda_room *room, struct mlak_cuda_job *job);

/* Its kernels on a stream: prepare, unless what it uses is prepared; split, combine. */
CUresult cuda_launch(const struct mlak_device *device, const struct cuda_room *room, struct mlak_cuda_job *job,
                     bool prepared, CUstream stream);

/* Until the device says that the launch is over. A slice whose first row the caller cancels meanwhile is given up; none
 * of count 0. */
enum mlak_code cuda_await(struct mlak_device *device, struct cuda_room *room, uint64_t ticket,
                          const struct cuda_slice *slices, uint32_t count, struct mlak_fault *fault);

/* What came of source `index` of the room's launch that ended last, with its rows from `at` on: MLAK_OK and the slice's
 * rows, or MLAK_BATCH. */
enum mlak_code cuda_outcome(const struct cuda_room *room, uint32_t index, uint32_t at, const struct cuda_slice *slice,
                            struct mlak_fault *fault);

/* mlak_backend's functions of these names. */
bool cuda_mergeable(const struct mlak_device *device, const struct mlak_batch *a, const struct mlak_batch *b);
enum mlak_code cuda_launch_batches(struct mlak_device *device, uint32_t which, struct mlak_part *parts, uint32_t n,
                                   bool layer, struct mlak_fault *fault);

/* cuda_graph.c: mlak_backend's functions of these names. */
struct mlak_graph *cuda_graph_new(struct mlak_device *device, const struct mlak_batch *batches, uint32_t count,
                                  struct mlak_fault *fault);
enum mlak_code cuda_graph_replay(struct mlak_device *device, struct mlak_graph *graph, struct mlak_row *rows,
                                 struct mlak_fault *fault);
void cuda_graph_free(struct mlak_device *device, struct mlak_graph *graph);
enum mlak_code cuda_time_batches(struct mlak_device *device, const struct mlak_batch *batches, uint32_t count,
                                 bool layers, uint32_t rounds, double *ns, struct mlak_fault *fault);

/* cuda_ordered.c: the same. cuda_ordered_close: before the context goes; NULL-safe. */
struct mlak_lane *cuda_lane_new(struct mlak_device *device, struct mlak_fault *fault);
void cuda_lane_abandon(struct mlak_device *device, struct mlak_lane *lane);
enum mlak_code cuda_lane_restart(struct mlak_device *device, struct mlak_lane *lane, struct mlak_fault *fault);
void cuda_lane_free(struct mlak_device *device, struct mlak_lane *lane);
struct mlak_order *cuda_order_new(struct mlak_device *device, struct mlak_lane *lane,
                                  const struct mlak_batch *const *batches, const struct mlak_flags *flags,
                                  uint32_t count, uint32_t wait_ms, struct mlak_fault *fault);
bool cuda_order_room(struct mlak_device *device, struct mlak_order *order);
enum mlak_code cuda_order_launch(struct mlak_device *device, struct mlak_order *order, uint32_t round,
                                 struct mlak_fault *fault);
enum mlak_code cuda_order_poll(struct mlak_device *device, struct mlak_order *order, bool *ended,
                               struct mlak_order_outcome *outcome, struct mlak_fault *fault);
void cuda_order_free(struct mlak_device *device, struct mlak_order *order);
void cuda_ordered_close(struct mlak_device *device);

#endif
