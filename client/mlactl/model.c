/* model.c - exact results and the bar.
 *
 * The contract's bar is the error of exact arithmetic in which only P (relative to its row's maximum) and out are
 * rounded, less 1 dB (fp8 q: 2 dB). That error is one draw of a random variable: with very few keys or rows it may be
 * nought. So the bar takes the larger of the draw and its expectation (every rounding uniform within half a unit:
 * unit^2 / 12), the latter raised by four standard deviations of a sum of that many roundings, at most threefold, which
 * is the worst a single rounding can do. */
#include "model.h"
#include "numbers.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { D = 576, V = 512 };

/* ---- which keys ---- */

int64_t model_local_len(const mla_batch *batch, int64_t global_len)
{
    int64_t world = batch->dcp_world, rank = batch->dcp_rank, run = batch->dcp_interleave, turn = world * run;
    int64_t rest = global_len % turn - rank * run;
    return global_len / turn * run + (rest < 0 ? 0 : rest > run ? run : rest);
}

int64_t model_global_key(const mla_batch *batch, int64_t c)
{
    int64_t run = batch->dcp_interleave;
    return c / run * batch->dcp_world * run + batch->dcp_rank * run + c % run;
}

struct model_request model_request(const struct capture *capture, uint32_t index)
{
    const mla_batch *batch = &capture->batch;
    const int32_t *cu_q = capture->data[CAPTURE_CU_Q].memory, *seqlens = capture->data[CAPTURE_SEQLENS].memory;
    uint64_t uniform = batch->q_rows / batch->batch;
    struct model_request request = {.capture = capture, .index = index};
    request.first_row = cu_q ? (uint64_t)cu_q[index] : index * uniform;
    request.q_len = (uint32_t)(cu_q ? (uint64_t)(cu_q[index + 1] - cu_q[index]) : uniform);
    request.global_len = seqlens[index];
    request.local_len = model_local_len(batch, seqlens[index]);
    request.block_table =
        (const int32_t *)capture->data[CAPTURE_BLOCK_TABLE].memory + (uint64_t)index * batch->max_pages;
    return request;
}

bool model_sees(const struct model_request *request, uint32_t t, int64_t c)
{
    const mla_batch *batch = &request->capture->batch;
    int64_t key = model_global_key(batch, c), length = request->global_len, q_len = request->q_len;
    int64_t bound = length;
    if (batch->mask == MLA_MASK_CAUSAL) {
        bound = length - (q_len - 1) + t;
        bound = bound < 0 ? 0 : bound > length ? length : bound;
    }
    if (key >= bound || (batch->window && key < bound - (int64_t)batch->window))
        return false;
    if (batch->mask != MLA_MASK_TREE || key < length - q_len)
        return true;
    const uint64_t *masks = request->capture->data[CAPTURE_TREE_MASK].memory;
    return masks[request->first_row + t] >> (key - (length - q_len)) & 1;
}

bool model_seen(const struct model_request *request, int64_t c)
{
    for (uint32_t t = 0; t < request->q_len; t++)
        if (model_sees(request, t, c))
            return true;
    return false;
}

/* ---- arithmetic ---- */

static double scale_of(const struct capture *capture, enum capture_tensor tensor, double absent)
{
    const float *scale = capture->data[tensor].memory;
    return scale ? (double)*scale : absent;
}

/* Key c of a request, dequantised: 576 numbers to score with, of which 512 times value_scale are the value. */
static void read_key(const struct model_request *request, int64_t c, double key_scale, double key[D])
{
    const mla_batch *batch = &request->capture->batch;
    uint64_t row =
        (uint64_t)request->block_table[c / batch->page_size] * batch->page_size + (uint64_t)c % batch->page_size;
    const uint8_t *from = (const uint8_t *)request->capture->data[CAPTURE_KV].memory + row * capture_row_bytes(batch);
    if (batch->kv_format == MLA_KV_E4M3_656) {
        float scales[4];
        memcpy(scales, from + V, sizeof scales);
        for (unsigned d = 0; d < V; d++)
            key[d] = number_at(MLA_E4M3, from, d) * (double)scales[d / 128];
        for (unsigned d = V; d < D; d++)
            key[d] = number_at(MLA_BF16, from + V + sizeof scales, d - V);
        return;
    }
    mla_dtype type = batch->kv_format == MLA_KV_BF16 ? MLA_BF16 : batch->kv_format == MLA_KV_FP16 ? MLA_FP16 : MLA_E4M3;
    for (unsigned d = 0; d < D; d++)
        key[d] = number_at(type, from, d) * key_scale;
}

/* Sums over the rows of one request. */
struct noise { double signal, drawn, expected, expected_squares; };

static void add_expected(struct noise *noise, double variance)
{
    noise->expected += variance;
    noise->expected_squares += variance * variance;
}

/* One row: token t, head h. `keys` [local_len][576] and `norms` [local_len] (sum of value^2) are those of the request.
 */
static void decode_row(const struct model_request *request, uint32_t t, uint32_t h, const double *keys,
                       const double *norms, double value_ratio, double *scores, struct model *model,
                       struct noise *noise)
{
    const struct capture *capture = request->capture;
    const mla_batch *batch = &capture->batch;
    uint64_t row = (request->first_row + t) * batch->heads + h;
    double q[D], scale = batch->softmax_scale * scale_of(capture, CAPTURE_Q_SCALE, 1), largest = -INFINITY;
    for (unsigned d = 0; d < D; d++)
        q[d] = number_at(batch->q_dtype, capture->data[CAPTURE_Q].memory, row * D + d);
    for (int64_t c = 0; c < request->local_len; c++) {
        double dot = 0;
        scores[c] = -INFINITY;
        if (!model_sees(request, t, c))
            continue;
        for (unsigned d = 0; d < D; d++)
            dot += q[d] * keys[c * D + d];
        scores[c] = dot * scale;
        largest = fmax(largest, scores[c]);
    }
    const float *sink = batch->dcp_rank == 0 ? capture->data[CAPTURE_SINK].memory : NULL;
    double top = sink ? fmax(largest, (double)sink[h]) : largest, sum = sink ? exp((double)sink[h] - top) : 0;
    double *out = model->out + row * V, drawn[V] = {0}, p_scale = batch->q_dtype == MLA_E4M3 ? 256 : 1;
    for (int64_t c = 0; c < request->local_len; c++)
        if (!isinf(scores[c]))
            sum += exp(scores[c] - top);
    model->lse[row] = (sum > 0 ? top + log(sum) : -INFINITY) / (batch->lse_base == MLA_LSE_2 ? M_LN2 : 1);
    if (isinf(largest))
        return;
    double to_largest = exp(largest - top);  /* below 1 where the sink leads */
    for (int64_t c = 0; c < request->local_len; c++) {
        if (isinf(scores[c]))
            continue;
        double p = exp(scores[c] - largest), weight = to_largest * value_ratio / sum;
        double rounded = number_round(batch->q_dtype, p * p_scale) / p_scale;
        double unit = number_ulp(batch->q_dtype, p * p_scale) / p_scale * weight;
        for (unsigned d = 0; d < V; d++) {
            out[d] += p * weight * keys[c * D + d];
            drawn[d] += rounded * weight * keys[c * D + d];
        }
        add_expected(noise, unit * unit / 12 * norms[c]);
    }
    for (unsigned d = 0; d < V; d++) {
        double unit = number_ulp(capture_out_dtype(batch), out[d]);
        double error = number_round(capture_out_dtype(batch), drawn[d]) - out[d];
        noise->signal += out[d] * out[d];
        noise->drawn += error * error;
        add_expected(noise, unit * unit / 12);
    }
}

static struct model_bar bar_of(const struct noise *noise, bool fp8)
{
    double roundings = noise->expected * noise->expected / fmax(noise->expected_squares, 1e-300);
    double raised = noise->expected * fmin(3, 1 + 4 * sqrt(0.8 / fmax(roundings, 1e-9)));
    return (struct model_bar){noise->signal, fmax(noise->drawn, raised) * pow(10, fp8 ? 0.2 : 0.1)};
}

static int decode_request(struct model *model, const struct model_request *request)
{
    const struct capture *capture = request->capture;
    uint64_t count = (uint64_t)request->local_len + 1;
    double key_scale = scale_of(capture, CAPTURE_K_SCALE, 1),
           value_ratio = scale_of(capture, CAPTURE_V_SCALE, key_scale) / key_scale;
    ctl_autofree double *keys = calloc(count, D * sizeof *keys), *norms = calloc(count, sizeof *norms);
    ctl_autofree double *scores = calloc(count, sizeof *scores);
    if (!keys || !norms || !scores)
        return -1;
    for (int64_t c = 0; c < request->local_len; c++) {
        if (!model_seen(request, c))
            continue;
        read_key(request, c, key_scale, keys + c * D);
        for (unsigned d = 0; d < V; d++)
            norms[c] += keys[c * D + d] * keys[c * D + d];
    }
    struct noise noise = {0};
    for (uint32_t t = 0; t < request->q_len; t++)
        for (uint32_t h = 0; h < capture->batch.heads; h++)
            decode_row(request, t, h, keys, norms, value_ratio, scores, model, &noise);
    model->bars[request->index] = bar_of(&noise, capture->batch.q_dtype == MLA_E4M3);
    return 0;
}

struct model *model_new(const struct capture *capture)
{
    const mla_batch *batch = &capture->batch;
    uint64_t rows = batch->q_rows * batch->heads;
    struct model *model = calloc(1, sizeof *model);
    if (!model)
        return NULL;
    model->out = calloc(rows * V + 1, sizeof *model->out);
    model->lse = calloc(rows + 1, sizeof *model->lse);
    model->bars = calloc(batch->batch, sizeof *model->bars);
    model->lse_bar = batch->q_dtype == MLA_E4M3 ? 1e-3 : 2e-5;
    bool bad = !model->out || !model->lse || !model->bars;
    for (uint32_t b = 0; !bad && b < batch->batch; b++) {
        struct model_request request = model_request(capture, b);
        bad = decode_request(model, &request) != 0;
    }
    if (bad) {
        model_free(model);
        return NULL;
    }
    return model;
}

void model_free(struct model *model)
{
    if (!model)
        return;
    free(model->out);
    free(model->lse);
    free(model->bars);
    free(model);
}

/* ---- judgement ---- */

static bool judge_lse(const struct model *model, uint64_t row, double lse, struct judgement *judgement)
{
    double must = model->lse[row], share = fabs(lse - must) / (model->lse_bar * fmax(fabs(must), 1));
    if (isinf(must) ? lse == must : share <= 1) {
        judgement->lse_share = fmax(judgement->lse_share, isinf(must) ? 0 : share);
        return true;
    }
    judgement->lse_share = isnan(share) ? INFINITY : share;
    snprintf(judgement->why, sizeof judgement->why, "lse of row %llu is %.9g; it must be %.9g", (unsigned long long)row,
             lse, must);
    return false;
}

struct judgement model_judge(const struct model *model, const struct model_request *request, const void *out,
                             const float *lse)
{
    const mla_batch *batch = &request->capture->batch;
    const struct model_bar *bar = &model->bars[request->index];
    struct judgement judgement = {.good = true};
    double noise = 0;
    for (uint64_t row = request->first_row * batch->heads; row < (request->first_row + request->q_len) * batch->heads;
         row++) {
        if (judgement.good)
            judgement.good = judge_lse(model, row, (double)lse[row], &judgement);
        for (unsigned d = 0; d < V; d++) {
            double error = number_at(capture_out_dtype(batch), out, row * V + d) - model->out[row * V + d];
            noise += error * error; /* a NaN stays one */
        }
    }
    judgement.bar_db = 10 * log10(bar->signal / bar->noise);
    judgement.snr_db = isnan(noise) ? -INFINITY : 10 * log10(bar->signal / noise);
    if (bar->noise == 0) /* nothing visible: exact zeros */
        judgement.bar_db = judgement.snr_db = noise == 0 ? INFINITY : -INFINITY;
    if (judgement.good && !(noise <= bar->noise)) {
        judgement.good = false;
        snprintf(judgement.why, sizeof judgement.why, "SNR %.2f dB; it must be %.2f dB or more", judgement.snr_db,
                 judgement.bar_db);
    }
    return judgement;
}
