/* Settings of the environment. SPDX-License-Identifier: MIT */
#ifndef METALLOID_CORE_ENVIRONMENT_H
#define METALLOID_CORE_ENVIRONMENT_H

#include "core/status.h"

/* The value of METALLOID_<...>; NULL where it is not set, empty, or not to be trusted since the program has more
 * rights than its user. */
const char *mtl_setting(const char *name);

/* For a value that is not understood, and without which the call goes on: says so on stderr, once a process for each
 * name, which is a literal. The words follow "<name>=<value> is ignored: " and tell what is allowed and what is used
 * instead. */
void mtl_setting_ignored(const char *name, const char *value, const char *format, ...) MTL_PRINTF(3, 4);

#endif
