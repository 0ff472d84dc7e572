/* The runs of a gated activation. SPDX-License-Identifier: MIT
 *
 * Included by swiglu.c and geglu.c after they define activation(x, tanh, narrow); `narrow`: for results of 16 bits, whose rounding is 2^-12
 * of them or more, and which an error of 2^-17 therefore moves hardly ever. One read of gate and up, one write of out. */

INLINE void gated_run(const char *gate, const char *up, char *out, mtl_dtype dtype, int64_t count, bool tanh,
                      bool stream) {
    int64_t size = mtl_dtype_size(dtype), i = 0;
    bool narrow = size == 2;
    for (; i + 2 * LANES <= count; i += 2 * LANES) {
        vec_two x = vec_load_two(gate + i * size, dtype), u = vec_load_two(up + i * size, dtype);
        x.low = activation(x.low, tanh, narrow) * u.low;
        x.high = activation(x.high, tanh, narrow) * u.high;
        vec_put_two(stream, out + i * size, dtype, x);
    }
    for (; i < count; i += LANES) {
        vec x = vec_load_upto(gate + i * size, dtype, count - i), u = vec_load_upto(up + i * size, dtype, count - i);
        vec_store_upto(out + i * size, dtype, activation(x, tanh, narrow) * u, count - i);
    }
}

INLINE void gated_items(const mtl_gated_args *args, int64_t begin, int64_t end, real *scratch, bool tanh) {
    mtl_dtype dtype = args->gate.dtype;
    bool direct = in_place_row(args->gate, dtype) && in_place_row(args->up, dtype) && in_place_row(args->out, dtype);
    mtl_cursor at;
    for (int64_t item = begin; item < end; item++) {
        mtl_cursor_seek(&at, &args->rows, item / args->runs);
        int64_t first = item % args->runs * args->run;
        int64_t count = first + args->run < args->length ? args->run : args->length - first;
        const char *gate = args->gate.data + at.offset[MTL_GATED_GATE] + first * args->gate.stride;
        const char *up = args->up.data + at.offset[MTL_GATED_UP] + first * args->up.stride;
        char *out = args->out.data + at.offset[MTL_GATED_OUT] + first * args->out.stride;
        bool stream = args->stream && can_stream(out);
        if (direct && dtype == REAL_DTYPE) {
            gated_run(gate, up, out, REAL_DTYPE, count, tanh, stream);
#ifndef MTL_IN_DOUBLE
        } else if (direct && dtype == MTL_F16) {
            gated_run(gate, up, out, MTL_F16, count, tanh, stream);
        } else if (direct && dtype == MTL_BF16) {
            gated_run(gate, up, out, MTL_BF16, count, tanh, stream);
#endif
        } else {
            real *up_row = scratch + args->run;
            read_row(scratch, gate, args->gate, count);
            read_row(up_row, up, args->up, count);
            gated_run((const char *)scratch, (const char *)up_row, (char *)scratch, REAL_DTYPE, count, tanh, false);
            write_row(out, args->out, scratch, count);
        }
    }
    if (args->stream) vec_stream_end();
}
