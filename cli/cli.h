/* The `metalloid` command. SPDX-License-Identifier: MIT */
#ifndef METALLOID_CLI_H
#define METALLOID_CLI_H

enum { EXIT_OK = 0, EXIT_FAILED = 1, EXIT_USAGE = 2 };

/* Each gets the arguments after its own name. */
int metalloid_cli_info(int count, char **arguments);
int metalloid_cli_check(int count, char **arguments);
int metalloid_cli_bench(int count, char **arguments);

/* bench --kernels, and what it starts to see a call of another process. */
int metalloid_cli_bench_kernels(void);
int metalloid_cli_bench_kernels_cached(void);

#endif
