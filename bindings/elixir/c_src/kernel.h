/* Custom kernels as NIFs of Metalloid.NIF. SPDX-License-Identifier: MIT */
#ifndef METALLOID_ELIXIR_KERNEL_H
#define METALLOID_ELIXIR_KERNEL_H

#include <erl_nif.h>
#include <stdbool.h>

bool kernel_load(ErlNifEnv *env, bool upgrade);

ERL_NIF_TERM kernel_create(ErlNifEnv *env, int argc, const ERL_NIF_TERM *argv);
ERL_NIF_TERM kernel_launch(ErlNifEnv *env, int argc, const ERL_NIF_TERM *argv);
ERL_NIF_TERM kernel_source(ErlNifEnv *env, int argc, const ERL_NIF_TERM *argv);

#endif
