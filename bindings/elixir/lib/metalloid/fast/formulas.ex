if Code.ensure_loaded?(Nx) do
  defmodule Metalloid.Fast.Formulas do
    @moduledoc false
    # The operations of Metalloid.Fast in plain Nx, for their derivatives alone: the C library has no backward passes
    # yet. Each takes all arguments of the call by name, computes in float32 or float64 as the kernels do, and rounds
    # once.

    def rms_norm(%{x: x, eps: eps} = all) do
      wide = wide([x, all[:weight]])
      x_wide = Nx.as_type(x, wide)

      x_wide
      |> Nx.multiply(
        Nx.rsqrt(Nx.add(Nx.mean(Nx.multiply(x_wide, x_wide), axes: [-1], keep_axes: true), constant(eps, wide)))
      )
      |> scale_and_shift(all[:weight], nil, wide)
      |> Nx.as_type(Nx.type(x))
    end

    def layer_norm(%{x: x, eps: eps} = all) do
      wide = wide([x, all[:weight], all[:bias]])
      x_wide = Nx.as_type(x, wide)
      centred = Nx.subtract(x_wide, Nx.mean(x_wide, axes: [-1], keep_axes: true))
      variance = Nx.mean(Nx.multiply(centred, centred), axes: [-1], keep_axes: true)

      centred
      |> Nx.multiply(Nx.rsqrt(Nx.add(variance, constant(eps, wide))))
      |> scale_and_shift(all[:weight], all[:bias], wide)
      |> Nx.as_type(Nx.type(x))
    end

    defp scale_and_shift(x, weight, bias, wide) do
      x = if weight, do: Nx.multiply(x, Nx.as_type(weight, wide)), else: x
      if bias, do: Nx.add(x, Nx.as_type(bias, wide)), else: x
    end

    def swiglu(%{gate: gate, up: up}) do
      wide = wide([gate, up])
      [g, u] = [Nx.as_type(gate, wide), Nx.as_type(up, wide)]
      g |> Nx.multiply(Nx.sigmoid(g)) |> Nx.multiply(u) |> Nx.as_type(Nx.type(gate))
    end

    def geglu(%{gate: gate, up: up, approximate: approximate}) do
      wide = wide([gate, up])
      [g, u] = [Nx.as_type(gate, wide), Nx.as_type(up, wide)]

      share =
        case approximate do
          :none ->
            Nx.erf(Nx.multiply(g, constant(:math.sqrt(0.5), wide)))

          :tanh ->
            cube = Nx.multiply(Nx.multiply(g, g), g)
            sum = Nx.add(g, Nx.multiply(cube, constant(0.044715, wide)))
            Nx.tanh(Nx.multiply(sum, constant(:math.sqrt(2 / :math.pi()), wide)))
        end

      g |> Nx.multiply(0.5) |> Nx.multiply(Nx.add(share, 1)) |> Nx.multiply(u) |> Nx.as_type(Nx.type(gate))
    end

    # Hidden scores are 0 before the exponential and their weights 0 after it, so that no -inf meets another; the
    # largest score is a constant of the derivative, since it cancels. The derivative multiplies hidden scores' zeros by
    # q, k and v, where NaN or an infinity would survive: products are those of what is finite, and NaN comes back as the
    # score of a pair that is seen.
    def scaled_dot_product_attention(%{q: q, k: k, v: v} = all) do
      wide = wide([q, k, v])
      heads_first = fn t -> if all[:time_axis] == 1, do: Nx.transpose(t, axes: [0, 2, 1, 3]), else: t end
      [qw, kw, vw] = Enum.map([q, k, v], &(&1 |> Nx.as_type(wide) |> heads_first.()))
      {batch, q_heads, q_len, _} = Nx.shape(qw)
      {_, kv_heads, kv_len, _} = Nx.shape(kw)
      [kw, vw] = Enum.map([kw, vw], &repeat_heads(&1, div(q_heads, kv_heads)))
      full = {batch, q_heads, q_len, kv_len}
      finite = fn t -> Nx.equal(Nx.subtract(t, t), 0) end
      [sound_q, sound_k, sound_v] = Enum.map([qw, kw, vw], &Nx.all(finite.(&1), axes: [3]))
      [qw, kw, vw] = Enum.map([qw, kw, vw], &Nx.select(finite.(&1), &1, 0))
      sound = sound_k |> Nx.logical_and(sound_v) |> Nx.new_axis(2) |> Nx.logical_and(Nx.new_axis(sound_q, 3))

      scores = qw |> Nx.dot([3], [0, 1], kw, [3], [0, 1]) |> Nx.multiply(constant(all.scale, wide))
      cap = all[:softcap] && constant(all.softcap, wide)
      scores = if cap, do: scores |> Nx.divide(cap) |> Nx.tanh() |> Nx.multiply(cap), else: scores
      {scores, seen_by_mask} = add_mask(scores, all[:mask], wide, full)
      scores = Nx.select(sound, scores, Nx.Constants.nan(wide, backend: Nx.BinaryBackend))

      seen =
        [seen_by_mask, key_mask(all[:key_mask]), seen_in_time(all, q_len, kv_len)]
        |> Enum.reject(&is_nil/1)
        |> Enum.reduce(Nx.tensor(1, type: :u8, backend: Nx.BinaryBackend), &Nx.logical_and/2)
        |> Nx.broadcast(full)

      lowest = Nx.Constants.min_finite(wide, backend: Nx.BinaryBackend)
      largest = seen |> Nx.select(scores, lowest) |> Nx.reduce_max(axes: [3], keep_axes: true)
      sinks = all[:sinks] && all.sinks |> Nx.as_type(wide) |> Nx.reshape({1, q_heads, 1, 1})
      largest = if sinks, do: Nx.max(largest, sinks), else: largest
      largest = Nx.Defn.Kernel.stop_grad(largest)

      weights = Nx.select(seen, Nx.exp(Nx.subtract(Nx.select(seen, scores, largest), largest)), 0)
      total = Nx.sum(weights, axes: [3], keep_axes: true)
      total = if sinks, do: Nx.add(total, Nx.exp(Nx.subtract(sinks, largest))), else: total
      total = Nx.select(Nx.equal(total, 0), 1, total)

      weights
      |> Nx.divide(total)
      |> Nx.dot([3], [0, 1], vw, [2], [0, 1])
      |> heads_first.()
      |> Nx.as_type(Nx.type(q))
    end

    defp repeat_heads(t, 1), do: t

    defp repeat_heads(t, times) do
      {batch, heads, time, dim} = Nx.shape(t)

      t
      |> Nx.new_axis(2)
      |> Nx.broadcast({batch, heads, times, time, dim})
      |> Nx.reshape({batch, heads * times, time, dim})
    end

    defp add_mask(scores, nil, _, _), do: {scores, nil}

    defp add_mask(scores, mask, wide, full) do
      if Nx.Type.integer?(Nx.type(mask)) do
        {scores, mask |> Nx.not_equal(0) |> Nx.broadcast(full)}
      else
        mask = mask |> Nx.as_type(wide) |> Nx.broadcast(full)
        seen = Nx.not_equal(mask, Nx.Constants.neg_infinity(wide, backend: Nx.BinaryBackend))
        {Nx.add(scores, Nx.select(seen, mask, 0)), seen}
      end
    end

    defp key_mask(nil), do: nil
    defp key_mask(mask), do: mask |> Nx.not_equal(0) |> Nx.new_axis(1) |> Nx.new_axis(1)

    defp seen_in_time(all, q_len, kv_len) do
      aligned = kv_len - q_len

      offset =
        case all do
          %{causal_offset: offset} -> offset
          %{causal: :key_masked, key_mask: mask} when q_len > 1 -> Nx.select(Nx.all(Nx.not_equal(mask, 0)), aligned, 0)
          _ -> aligned
        end

      if all.causal || all[:window] do
        latest = {q_len, 1} |> Nx.iota(axis: 0, type: :s64, backend: Nx.BinaryBackend) |> Nx.add(offset)
        key = Nx.iota({1, kv_len}, axis: 1, type: :s64, backend: Nx.BinaryBackend)
        seen = Nx.less_equal(key, latest)

        if window = all[:window],
          do: Nx.logical_and(seen, Nx.greater(key, Nx.subtract(latest, window))),
          else: seen
      end
    end

    def kv_cache_attention(%{q: q, new_k: new_k, new_v: new_v, k_cache: k_cache, v_cache: v_cache} = all) do
      q_len = elem(Nx.shape(q), 1)
      latest = elem(Nx.shape(k_cache), 1) - q_len
      offset = all.offset |> Nx.reshape({}) |> Nx.min(latest) |> Nx.max(0)

      %{
        q: q,
        k: put_slice(k_cache, new_k, all.offset),
        v: put_slice(v_cache, new_v, all.offset),
        key_mask: all[:key_mask],
        scale: all.scale,
        causal: q_len > 1,
        causal_offset: offset,
        time_axis: 1
      }
      |> scaled_dot_product_attention()
      |> Nx.transpose(axes: [0, 2, 1, 3])
    end

    def put_slice(cache, new, offset), do: Nx.put_slice(cache, [0, Nx.reshape(offset, {}), 0, 0], new)

    # Nx makes a float32 of a number beside a tensor.
    defp constant(%Nx.Tensor{} = value, wide), do: Nx.as_type(value, wide)
    defp constant(value, wide), do: Nx.tensor(value, type: wide, backend: Nx.BinaryBackend)

    defp wide(tensors) do
      if Enum.any?(tensors, &(&1 && Nx.type(&1) == {:f, 64})), do: {:f, 64}, else: {:f, 32}
    end
  end
end
