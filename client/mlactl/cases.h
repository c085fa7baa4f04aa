/* cases.h - random batches over the decode contract, small enough for the reference. */
#ifndef MLACTL_CASES_H
#define MLACTL_CASES_H

#include "capture.h"
#include "run.h"

#include "mlap.h"

/* A batch that one capability row covers, the same for the same seed. Edges are frequent: no keys, fewer keys than
 * query tokens, tile and page edges, NaN in every key that nothing sees, nonsense in every table entry that nothing
 * needs. `text` says what it is. NULL: no memory. */
struct capture *case_new(uint64_t seed, const struct mlap_capability *row, struct run_layout *layout, char text[200]);

#endif
