/* numbers.h - the short floating-point formats, bit for bit, through double. Slow and general: for checking only. */
#ifndef MLACTL_NUMBERS_H
#define MLACTL_NUMBERS_H

#include <mla.h>

#include <stdint.h>

/* Distance between neighbours of `type` at x's magnitude. */
double number_ulp(mla_dtype type, double x);
/* x to the nearest value of `type`, ties to even. x must be within its range. */
double number_round(mla_dtype type, double x);
/* The bits of number_round(x), and the value of bits. */
uint16_t number_encode(mla_dtype type, double x);
double number_decode(mla_dtype type, uint16_t bits);
/* Element i of an array of `type`. */
double number_at(mla_dtype type, const void *array, uint64_t i);
void number_put(mla_dtype type, void *array, uint64_t i, double x);

#endif
