/* oracle.h - what a request's outputs must be, computed from the contract in the plainest way: its keys gathered
 * densely, every sum in long double, element types by ldexp. Shares no arithmetic with kernels/. */
#ifndef ORACLE_H
#define ORACLE_H

#include "batch_maker.h"

/* Value of a code; its rounding to the type, to nearest even. */
double oracle_decode(enum mlak_dtype dtype, uint32_t code);
long double oracle_round(enum mlak_dtype dtype, long double value);

struct oracle {
    struct made *made;
    uint32_t request, tokens, heads;
    double *exact, *model;          /* [tokens, heads, 512]; model: exact with P and out rounded to the types in use */
    double *lse;                    /* [tokens, heads] */
};

/* `round_p` false: the model rounds out only, which is what an fp64 backend does. */
struct oracle *oracle_new(struct made *made, uint32_t request, bool round_p);
void oracle_free(struct oracle *oracle);

/* The request's outputs hold against the contract's bar; else `why` says what does not. */
struct oracle_bar { double margin_db, lse; };
bool oracle_holds(const struct oracle *oracle, struct oracle_bar bar, char why[256]);

#endif
