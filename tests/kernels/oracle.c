/* oracle.c - see oracle.h. Slow by intent; for hundreds of keys. An oracle owns its arrays and borrows the batch. */
#include "oracle.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- element types ---- */

struct format { int exponent_bits, mantissa_bits; };
static const struct format formats[MLAK_DTYPE_COUNT] = {{8, 7}, {5, 10}, {4, 3}};

static int bias_of(struct format f) { return (1 << (f.exponent_bits - 1)) - 1; }

double oracle_decode(enum mlak_dtype dtype, uint32_t code)
{
    struct format f = formats[dtype];
    int mantissa = (int)(code & ((1u << f.mantissa_bits) - 1)), top = (1 << f.exponent_bits) - 1;
    int exponent = (int)(code >> f.mantissa_bits) & top;
    double sign = code >> (f.exponent_bits + f.mantissa_bits) & 1 ? -1 : 1;
    if (dtype == MLAK_E4M3 ? exponent == top && mantissa == 7 : exponent == top && mantissa != 0)
        return NAN;
    if (dtype != MLAK_E4M3 && exponent == top)
        return sign * INFINITY;
    if (exponent == 0)
        return sign * ldexp(mantissa, 1 - bias_of(f) - f.mantissa_bits);
    return sign * ldexp(mantissa + (1 << f.mantissa_bits), exponent - bias_of(f) - f.mantissa_bits);
}

long double oracle_round(enum mlak_dtype dtype, long double value)
{
    struct format f = formats[dtype];
    if (value == 0 || !isfinite(value))
        return value;
    int least = 1 - bias_of(f), exponent = ilogbl(value) < least ? least : ilogbl(value);
    long double unit = ldexpl(1, exponent - f.mantissa_bits), rounded = nearbyintl(value / unit) * unit;
    long double largest = dtype == MLAK_E4M3 ? 448 : ldexpl(2 - ldexpl(1, -f.mantissa_bits), bias_of(f));
    if (fabsl(rounded) <= largest)
        return rounded;
    return copysignl(dtype == MLAK_E4M3 ? 448 : INFINITY, value);
}

/* Element i of a row of elements of one type. */
static double element(enum mlak_dtype dtype, const uint8_t *row, size_t i)
{
    uint16_t half;
    if (dtype == MLAK_E4M3)
        return oracle_decode(dtype, row[i]);
    memcpy(&half, row + 2 * i, sizeof half);
    return oracle_decode(dtype, half);
}

static void decode_key(enum mlak_kv_format format, const uint8_t *row, double to[MLAK_D])
{
    static const enum mlak_dtype types[] = {MLAK_BF16, MLAK_FP16, MLAK_E4M3};
    for (size_t i = 0; i < MLAK_D; i++) {
        float scale = 1;
        if (format != MLAK_KV_E4M3_656) {
            to[i] = element(types[format], row, i);
        } else if (i < MLAK_V) {
            memcpy(&scale, row + MLAK_V + i / 128 * 4, sizeof scale);
            to[i] = (double)scale * element(MLAK_E4M3, row, i);
        } else {
            to[i] = element(MLAK_BF16, row + 528, i - MLAK_V);
        }
    }
}

/* ---- a request ---- */

static double scale_value(const struct mlak_scale *scale, double absent)
{
    return !scale->present ? absent : scale->tensor ? (double)*scale->tensor : (double)scale->value;
}

/* One token and head over the dense keys: `seen` of `k` global keys, NULL rows elsewhere. What it reads nobody else
 * writes, and it would be half the time of tests under the thread sanitizer. */
__attribute__((no_sanitize_thread)) static void decode_one(struct oracle *o, uint32_t t, uint32_t h, int64_t k,
                                                           double (**keys)[MLAK_D], bool round_p)
{
    const struct mlak_batch *b = &o->made->batch;
    uint32_t token = made_q_start(o->made, o->request) + t, q_len = o->tokens;
    uint64_t bits = b->has_tree_mask ? b->tree_mask[token] : 0;
    size_t q_bytes = MLAK_D * mlak_dtype_bytes(b->q_dtype);
    double q[MLAK_D];
    double k_scale = scale_value(&b->k_scale, 1), v_scale = scale_value(&b->v_scale, k_scale);
    double factor = b->softmax_scale * k_scale * scale_value(&b->q_scale, 1);
    long double *score = malloc(((size_t)k + 1) * sizeof *score), top = -INFINITY, total = 0;
    long double exact[MLAK_V] = {0}, model[MLAK_V] = {0};
    bool sink = b->has_sink && b->dcp_rank == 0;
    if (!score)
        abort();

    for (size_t i = 0; i < MLAK_D; i++)
        q[i] = element(b->q_dtype, o->made->tensor[MLAK_T_Q].data + ((size_t)token * o->heads + h) * q_bytes, i);
    for (int64_t g = 0; g < k; g++) {
        score[g] = -INFINITY;
        if (!contract_holds(b, g) || !contract_sees(b, k, q_len, t, bits, g))
            continue;
        const double *key = *keys[g];
        long double product = 0;
        for (size_t i = 0; i < MLAK_D; i++)
            product += (long double)q[i] * (long double)key[i];
        score[g] = product * (long double)factor;
        top = score[g] > top ? score[g] : top;
    }
    score[k] = sink ? (long double)b->sink[h] : -INFINITY;
    top = score[k] > top ? score[k] : top;
    for (int64_t g = 0; g <= k; g++) {
        long double p = score[g] == -INFINITY ? 0 : expl(score[g] - top), rounded = p;
        total += p;
        if (p == 0 || g == k)
            continue;
        if (round_p)
            rounded = b->q_dtype == MLAK_E4M3 ? oracle_round(MLAK_E4M3, p * 256) / 256 : oracle_round(b->q_dtype, p);
        const double *key = *keys[g];
        for (size_t i = 0; i < MLAK_V; i++) {
            exact[i] += p * (long double)key[i];
            model[i] += rounded * (long double)key[i];
        }
    }
    size_t at = (size_t)t * o->heads + h;
    for (size_t i = 0; i < MLAK_V; i++) {
        o->exact[at * MLAK_V + i] = total > 0 ? (double)(exact[i] / total * (long double)v_scale) : 0;
        o->model[at * MLAK_V + i] =
            total > 0 ? (double)oracle_round(b->out_dtype, model[i] / total * (long double)v_scale) : 0;
    }
    long double lse = total > 0 ? top + logl(total) : -INFINITY;
    o->lse[at] = (double)(b->lse_base == MLAK_LSE_2 ? lse / logl(2) : lse);
    free(score);
}

struct oracle *oracle_new(struct made *made, uint32_t request, bool round_p)
{
    const struct mlak_batch *b = &made->batch;
    struct oracle *o = calloc(1, sizeof *o);
    int64_t k = made_seqlens(made)[request], c = 0;
    double(**keys)[MLAK_D] = calloc((size_t)k + 1, sizeof *keys);
    if (!o || !keys)
        abort();
    *o = (struct oracle){.made = made, .request = request, .tokens = made_q_len(made, request), .heads = b->heads};
    size_t values = (size_t)o->tokens * o->heads * MLAK_V;
    o->exact = calloc(values + 1, sizeof *o->exact);
    o->model = calloc(values + 1, sizeof *o->model);
    o->lse = calloc(values / MLAK_V + 1, sizeof *o->lse);
    if (!o->exact || !o->model || !o->lse)
        abort();

    for (int64_t g = 0; g < k; g++) {
        if (!contract_holds(b, g))
            continue;
        for (uint32_t t = 0; t < o->tokens && !keys[g]; t++) {
            uint64_t bits = b->has_tree_mask ? b->tree_mask[made_q_start(made, request) + t] : 0;
            if (!contract_sees(b, k, o->tokens, t, bits, g))
                continue;
            if (!(keys[g] = malloc(sizeof *keys[g])))
                abort();
            decode_key(b->kv_format, made_key(made, request, c), *keys[g]);
        }
        c++;
    }
    for (uint32_t t = 0; t < o->tokens; t++)
        for (uint32_t h = 0; h < o->heads; h++)
            decode_one(o, t, h, k, keys, round_p);
    for (int64_t g = 0; g < k; g++)
        free(keys[g]);
    free(keys);
    return o;
}

void oracle_free(struct oracle *oracle)
{
    if (!oracle)
        return;
    free(oracle->exact);
    free(oracle->model);
    free(oracle->lse);
    free(oracle);
}

/* ---- judgement ---- */

/* What the model gives on N(0, 1) inputs once a request has many values; a small one may do better by luck, which is
 * asked of nobody. */
static const double usual_db[MLAK_DTYPE_COUNT] = {53.8, 72, 37};

bool oracle_holds(const struct oracle *o, struct oracle_bar bar, char why[256])
{
    const struct mlak_batch *b = &o->made->batch;
    double power = 0, noise = 0, allowed = 0;
    size_t first = (size_t)made_q_start(o->made, o->request) * o->heads, rows = (size_t)o->tokens * o->heads;
    for (size_t i = 0; i < rows * MLAK_V; i++) {
        double got = element(b->out_dtype, o->made->tensor[MLAK_T_OUT].data + first * MLAK_V * 2, i);
        if (!isfinite(got) || (o->exact[i] == 0 && got != 0)) {
            snprintf(why, 256, "request %u, row %zu: out[%zu] is %g, not %g", o->request, i / MLAK_V, i % MLAK_V, got,
                     o->exact[i]);
            return false;
        }
        power += o->exact[i] * o->exact[i];
        noise += (got - o->exact[i]) * (got - o->exact[i]);
        allowed += (o->model[i] - o->exact[i]) * (o->model[i] - o->exact[i]);
    }
    double usual = power / pow(10, usual_db[b->q_dtype] / 10), factor = pow(10, bar.margin_db / 10);
    if (noise > factor * (allowed > usual ? allowed : usual)) {
        snprintf(why, 256, "request %u: %.2f dB, the model has %.2f", o->request, 10 * log10(power / noise),
                 10 * log10(power / allowed));
        return false;
    }
    for (size_t i = 0; b->has_lse && i < rows; i++) {
        double want = o->lse[i], got = (double)b->lse[first + i];
        if (isinf(want) ? got != want : !(fabs(got - want) <= bar.lse * fmax(fabs(want), 1))) {
            snprintf(why, 256, "request %u, row %zu: lse is %.9g, not %.9g", o->request, i, got, want);
            return false;
        }
    }
    return true;
}
