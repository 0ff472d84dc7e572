if Code.ensure_loaded?(Nx) do
  defmodule Metalloid.FastTest do
    use ExUnit.Case, async: true

    import Nx.Defn

    alias Metalloid.Fast
    alias Metalloid.Fast.Formulas

    doctest Metalloid.Fast

    @floats [{:f, 32}, {:f, 16}, {:bf, 16}, {:f, 64}]

    defp normal(shape, type, seed) do
      {tensor, _} = Nx.Random.normal(Nx.Random.key(seed), shape: shape, type: {:f, 64})
      Nx.as_type(tensor, type)
    end

    defp largest(tensor), do: tensor |> Nx.as_type({:f, 64}) |> Nx.abs() |> Nx.reduce_max() |> Nx.to_number()

    # The exact result is the formula in float64 on the same numbers; a 16-bit result is that rounded.
    defp close(result, exact, bound \\ 1.0e-5) do
      bound = %{{:f, 16} => 1.0e-3, {:bf, 16} => 8.0e-3, {:f, 64} => 1.0e-11}[Nx.type(result)] || bound
      error = result |> Nx.as_type({:f, 64}) |> Nx.subtract(Nx.as_type(exact, {:f, 64})) |> largest()
      assert Nx.shape(result) == Nx.shape(exact)
      assert error <= bound * max(1, largest(exact)), "off by #{error}"
    end

    defp in_double(all) do
      Map.new(all, fn
        {name, %Nx.Tensor{type: {kind, _}} = t} when kind in [:f, :bf] -> {name, Nx.as_type(t, {:f, 64})}
        other -> other
      end)
    end

    # ---- every function, out of defn, in it, and its gradient ------------------------------------

    # Name, tensors in order, and the call on them: `out` is compared with the formula.
    defp functions(type) do
      x = normal({2, 3, 8}, type, 1)
      w = normal({8}, type, 2)
      b = normal({8}, type, 3)
      q = normal({2, 4, 3, 8}, type, 4)
      k = normal({2, 2, 5, 8}, type, 5)
      v = normal({2, 2, 5, 8}, type, 6)
      sinks = normal({4}, type, 7)
      hides = Nx.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
      added = normal({4, 3, 5}, type, 8)

      [bt_q, bt_new, cache] = [
        normal({2, 3, 4, 8}, type, 9),
        normal({2, 3, 2, 8}, type, 10),
        normal({2, 6, 2, 8}, type, 11)
      ]

      formula = fn names, others ->
        fn tensors -> names |> Enum.zip(tensors) |> Map.new() |> Map.merge(others) |> in_double() end
      end

      attention = fn names, others ->
        build = formula.(names, Map.merge(%{scale: 0.3, causal: false, time_axis: 2}, others))
        &Formulas.scaled_dot_product_attention(build.(&1))
      end

      [
        {"rms_norm/3", [x, w], fn [x, w] -> Fast.rms_norm(x, w, 1.0e-5) end,
         &Formulas.rms_norm(formula.([:x, :weight], %{eps: 1.0e-5}).(&1))},
        {"layer_norm/3", [x, w], fn [x, w] -> Fast.layer_norm(x, w, 1.0e-5) end,
         &Formulas.layer_norm(formula.([:x, :weight], %{eps: 1.0e-5}).(&1))},
        {"layer_norm/4", [x, w, b], fn [x, w, b] -> Fast.layer_norm(x, w, b, 1.0e-5) end,
         &Formulas.layer_norm(formula.([:x, :weight, :bias], %{eps: 1.0e-5}).(&1))},
        {"swiglu/2", [x, Nx.multiply(x, x)], fn [g, u] -> Fast.swiglu(g, u) end,
         &Formulas.swiglu(formula.([:gate, :up], %{}).(&1))},
        {"geglu/2", [x, Nx.multiply(x, x)], fn [g, u] -> Fast.geglu(g, u) end,
         &Formulas.geglu(formula.([:gate, :up], %{approximate: :none}).(&1))},
        {"geglu/3", [x, Nx.multiply(x, x)], fn [g, u] -> Fast.geglu(g, u, approximate: :tanh) end,
         &Formulas.geglu(formula.([:gate, :up], %{approximate: :tanh}).(&1))},
        {"rope/6", [q], fn [q] -> Fast.rope(q, 6, false, 10_000, 0.5, 3) end,
         fn [q] -> rotated(q, Nx.iota({2, 3}, axis: 1) |> Nx.add(3), 2, 6, false, 0.5, inverse(6, 10_000)) end},
        {"rope/6 traditional", [q], fn [q] -> Fast.rope(q, 8, true, 500, 1, -2) end,
         fn [q] -> rotated(q, Nx.iota({2, 3}, axis: 1) |> Nx.subtract(2), 2, 8, true, 1, inverse(8, 500)) end},
        {"rope_with_positions/6", [bt_q],
         fn [q] -> Fast.rope_with_positions(q, Nx.tensor([[0, 0, 9], [5, 3, 1]]), 8, false, 1.0e6, 1.0) end,
         fn [q] -> rotated(q, Nx.tensor([[0, 0, 9], [5, 3, 1]]), 1, 8, false, 1.0, inverse(8, 1.0e6)) end},
        {"rope_with_freqs/6", [bt_q],
         fn [q] ->
           Fast.rope_with_freqs(q, Nx.tensor([[0, 0, 9], [5, 3, 1]]), 4, true, 0.5, Nx.tensor([0.25, 0.125]))
         end, fn [q] -> rotated(q, Nx.tensor([[0, 0, 9], [5, 3, 1]]), 1, 4, true, 0.5, [0.25, 0.125]) end},
        {"scaled_dot_product_attention/4", [q, k, v],
         fn [q, k, v] -> Fast.scaled_dot_product_attention(q, k, v, 0.3) end, attention.([:q, :k, :v], %{})},
        {"scaled_dot_product_attention/5, sinks", [q, k, v, sinks],
         fn [q, k, v, s] -> Fast.scaled_dot_product_attention(q, k, v, 0.3, sinks: s) end,
         attention.([:q, :k, :v, :sinks], %{})},
        {"scaled_dot_product_attention/5, options", [q, k, v],
         fn [q, k, v] ->
           Fast.scaled_dot_product_attention(q, k, v, 0.3, causal: true, causal_offset: 1, window: 2, softcap: 1.5)
         end, attention.([:q, :k, :v], %{causal: true, causal_offset: 1, window: 2, softcap: 1.5})},
        {"scaled_dot_product_attention/5, mask", [q, k, v, added],
         fn [q, k, v, m] -> Fast.scaled_dot_product_attention(q, k, v, 0.3, m) end,
         attention.([:q, :k, :v, :mask], %{})},
        {"scaled_dot_product_attention/6", [q, k, v, added, sinks],
         fn [q, k, v, m, s] -> Fast.scaled_dot_product_attention(q, k, v, 0.3, m, sinks: s) end,
         attention.([:q, :k, :v, :mask, :sinks], %{})},
        {"scaled_dot_product_attention/6, integer mask", [q, k, v, sinks],
         fn [q, k, v, s] ->
           Fast.scaled_dot_product_attention(q, k, v, 0.3, Nx.tensor([[1, 0, 1, 2, 0]]), sinks: s)
         end, attention.([:q, :k, :v, :sinks], %{mask: Nx.tensor([[1, 0, 1, 2, 0]])})},
        {"scaled_dot_product_attention_causal/4", [q, k, v],
         fn [q, k, v] -> Fast.scaled_dot_product_attention_causal(q, k, v, 0.3) end,
         attention.([:q, :k, :v], %{causal: true})},
        {"scaled_dot_product_attention_causal/5", [q, k, v, sinks],
         fn [q, k, v, s] -> Fast.scaled_dot_product_attention_causal(q, k, v, 0.3, sinks: s) end,
         attention.([:q, :k, :v, :sinks], %{causal: true})},
        {"scaled_dot_product_attention_causal_key_masked/5", [q, k, v],
         fn [q, k, v] -> Fast.scaled_dot_product_attention_causal_key_masked(q, k, v, 0.3, hides) end,
         attention.([:q, :k, :v], %{causal: true, causal_offset: 0, key_mask: hides})},
        {"scaled_dot_product_attention_causal_key_masked/5, nothing masked", [q, k, v],
         fn [q, k, v] ->
           Fast.scaled_dot_product_attention_causal_key_masked(q, k, v, 0.3, Nx.broadcast(1, {2, 5}))
         end, attention.([:q, :k, :v], %{causal: true, causal_offset: 2})},
        {"scaled_dot_product_attention_causal_key_masked/6", [q, k, v, sinks],
         fn [q, k, v, s] ->
           Fast.scaled_dot_product_attention_causal_key_masked(q, k, v, 0.3, hides, sinks: s)
         end, attention.([:q, :k, :v, :sinks], %{causal: true, causal_offset: 0, key_mask: hides})},
        {"kv_cache_sdpa_update/8", [bt_q, bt_new, Nx.negate(bt_new), cache, Nx.cos(cache)],
         fn [q, k, v, k_cache, v_cache] ->
           mask = Nx.tensor([[1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
           {out, k, v} = Fast.kv_cache_sdpa_update(q, k, v, k_cache, v_cache, 2, mask, 0.3)
           Nx.concatenate([Nx.flatten(out), Nx.flatten(k), Nx.flatten(v)])
         end,
         fn [q, k, v, k_cache, v_cache] ->
           [k, v] = [Nx.put_slice(k_cache, [0, 2, 0, 0], k), Nx.put_slice(v_cache, [0, 2, 0, 0], v)]
           mask = Nx.tensor([[1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
           names = %{causal: true, causal_offset: 2, time_axis: 1, key_mask: mask}
           out = attention.([:q, :k, :v], names).([q, k, v]) |> Nx.transpose(axes: [0, 2, 1, 3])
           [out, k, v] = Enum.map([out, k, v], &(&1 |> Nx.as_type({:f, 64}) |> Nx.flatten()))
           Nx.concatenate([out, k, v])
         end}
      ]
    end

    defp inverse(dims, base), do: for(i <- 0..(div(dims, 2) - 1), do: :math.pow(base, -2 * i / dims))

    # Pair by pair, in float64.
    defp rotated(x, positions, time_axis, dims, traditional, scale, inv_freqs) do
      x = Nx.as_type(x, {:f, 64})
      half = div(dims, 2)
      {rank, last} = {Nx.rank(x), Nx.rank(x) - 1}
      {batch, time} = Nx.shape(positions)

      angle =
        positions
        |> Nx.as_type({:f, 64})
        |> Nx.multiply(scale)
        |> Nx.new_axis(-1)
        |> Nx.multiply(Nx.tensor(inv_freqs, type: {:f, 64}))
        |> Nx.reshape(
          1
          |> Tuple.duplicate(rank)
          |> put_elem(0, batch)
          |> put_elem(time_axis, time)
          |> put_elem(last, half)
        )

      pairs = for i <- 0..(half - 1), do: if(traditional, do: {2 * i, 2 * i + 1}, else: {i, i + half})
      column = &Nx.slice_along_axis(&1, &2, 1, axis: last)

      turned =
        for {{a, b}, i} <- Enum.with_index(pairs), reduce: %{} do
          columns ->
            [x1, x2] = [column.(x, a), column.(x, b)]
            [cos, sin] = [Nx.cos(column.(angle, i)), Nx.sin(column.(angle, i))]

            columns
            |> Map.put(a, Nx.subtract(Nx.multiply(x1, cos), Nx.multiply(x2, sin)))
            |> Map.put(b, Nx.add(Nx.multiply(x1, sin), Nx.multiply(x2, cos)))
        end

      Nx.concatenate(for(i <- 0..(Nx.axis_size(x, last) - 1), do: turned[i] || column.(x, i)), axis: last)
    end

    for type <- @floats do
      test "values in #{inspect(type)}, and the same bits inside defn" do
        for {name, tensors, call, exact} <- functions(unquote(type)) do
          result = call.(tensors)
          assert {name, Nx.type(result)} == {name, unquote(type)}
          close(result, Nx.Defn.jit_apply(&exact.(Tuple.to_list(&1)), [List.to_tuple(tensors)]))

          jitted = Nx.Defn.jit(fn tensors -> call.(Tuple.to_list(tensors)) end).(List.to_tuple(tensors))
          assert {name, Nx.to_binary(jitted)} == {name, Nx.to_binary(result)}
        end
      end
    end

    test "gradients are those of the formulas, and of differences" do
      for {name, tensors, call, exact} <- functions({:f, 64}) do
        direction = tensors |> call.() |> Nx.shape() |> normal({:f, 64}, 20)

        loss = fn function ->
          fn tensors -> tensors |> Tuple.to_list() |> function.() |> Nx.multiply(direction) |> Nx.sum() end
        end

        got = Nx.Defn.grad(List.to_tuple(tensors), loss.(call))
        expected = Nx.Defn.grad(List.to_tuple(tensors), loss.(exact))

        for {got, expected} <- Enum.zip(Tuple.to_list(got), Tuple.to_list(expected)) do
          assert largest(expected) > 1.0e-3, name
          close(got, expected)
        end

        # Along a random line, by central differences of the fused call itself.
        steps = tensors |> Enum.with_index(30) |> Enum.map(fn {t, i} -> normal(Nx.shape(t), {:f, 64}, i) end)
        at = fn by -> loss.(call).(List.to_tuple(Enum.zip_with(tensors, steps, &Nx.add(&1, Nx.multiply(&2, by))))) end
        slope = Nx.to_number(Nx.divide(Nx.subtract(at.(1.0e-5), at.(-1.0e-5)), 2.0e-5))

        along = Tuple.to_list(got) |> Enum.zip_with(steps, &Nx.to_number(Nx.sum(Nx.multiply(&1, &2)))) |> Enum.sum()

        assert_in_delta along, slope, 1.0e-5 * max(1, abs(slope)), name
      end
    end

    test "gradients in 16 bits have the type of their operand" do
      for type <- [{:f, 16}, {:bf, 16}], {name, tensors, call, _} <- functions(type) do
        grads =
          Nx.Defn.grad(List.to_tuple(tensors), fn tensors -> tensors |> Tuple.to_list() |> call.() |> Nx.sum() end)

        for {grad, tensor} <- Enum.zip(Tuple.to_list(grads), tensors) do
          assert {name, Nx.type(grad), Nx.shape(grad)} == {name, type, Nx.shape(tensor)}
          assert grad |> Nx.is_nan() |> Nx.any() |> Nx.to_number() == 0
        end
      end
    end

    test "the gradient of a gradient, through the fused call and through its formula" do
      x = normal({1, 2, 3, 4}, {:f, 64}, 40)
      call = fn x -> x |> Fast.rope(4, false, 100, 1.0, 5) |> Fast.rms_norm(nil, 1.0e-3) |> Nx.pow(3) |> Nx.sum() end
      twice = fn x -> Nx.sum(Nx.pow(Nx.Defn.grad(x, call), 2)) end
      direction = normal({1, 2, 3, 4}, {:f, 64}, 41)
      at = fn by -> Nx.to_number(twice.(Nx.add(x, Nx.multiply(direction, by)))) end
      slope = (at.(1.0e-5) - at.(-1.0e-5)) / 2.0e-5
      got = Nx.to_number(Nx.sum(Nx.multiply(Nx.Defn.grad(x, twice), direction)))
      assert_in_delta got, slope, 1.0e-4 * abs(slope)
    end

    test "the gradient beside constants, in any place" do
      for {name, tensors, call, _} <- functions({:f, 32}), i <- 0..(length(tensors) - 1) do
        loss = fn one -> tensors |> List.replace_at(i, one) |> call.() |> Nx.multiply(0.5) |> Nx.sum() end
        all = Nx.Defn.grad(List.to_tuple(tensors), &(&1 |> Tuple.to_list() |> call.() |> Nx.multiply(0.5) |> Nx.sum()))
        alone = Nx.Defn.grad(Enum.at(tensors, i), loss)
        assert Nx.to_number(Nx.all_close(alone, elem(all, i), atol: 1.0e-5)) == 1, name
      end
    end

    test "a row that sees no key has zeros and a gradient of zeros" do
      q = normal({1, 1, 2, 4}, {:f, 32}, 50)
      mask = Nx.tensor([[0, 0], [1, 1]])
      call = fn q -> Fast.scaled_dot_product_attention(q, q, q, 0.5, mask) end
      assert Nx.to_flat_list(call.(q)[[0, 0, 0]]) == [0.0, 0.0, 0.0, 0.0]
      grad = Nx.Defn.grad(q, fn x -> Nx.sum(Nx.multiply(call.(x), x)) end)
      assert grad |> Nx.is_nan() |> Nx.any() |> Nx.to_number() == 0
    end

    test "NaN in what is hidden leaves every gradient as it is" do
      q = normal({1, 2, 3, 4}, {:f, 32}, 51)
      [k, v] = for seed <- [52, 53], do: normal({1, 1, 5, 4}, {:f, 32}, seed)
      spoil = fn t, at, value -> Nx.put_slice(t, [0, 0, at, 1], Nx.tensor([[[[value, value]]]])) end

      masked = [mask: Nx.tensor([[1, 1, 1, 0, 1]])]
      key_masked = [key_mask: Nx.tensor([[1, 1, 1, 0, 1]]), causal: true]
      added = [mask: Nx.tensor([[0.5, 0.0, 0.0, :neg_infinity, 0.25]]), softcap: 5.0]

      for options <- [masked, key_masked, added], value <- [:nan, :infinity, :neg_infinity] do
        gradients = fn k, v ->
          Nx.Defn.grad({q, k, v}, fn {q, k, v} ->
            out = Fast.scaled_dot_product_attention(q, k, v, 0.5, options)
            Nx.sum(Nx.multiply(out, out))
          end)
        end

        assert gradients.(spoil.(k, 3, value), spoil.(v, 3, value)) == gradients.(k, v)
      end

      # Hidden from some queries alone: the first two do not see the last key, and the last gets what it sees.
      spoilt = spoil.(k, 4, :nan)

      causal = &Nx.sum(Fast.scaled_dot_product_attention_causal(&1, &2, v, 0.5))
      dq = Nx.Defn.grad(q, &causal.(&1, spoilt))
      assert dq[[.., .., 0..1]] == Nx.Defn.grad(q, &causal.(&1, k))[[.., .., 0..1]]
      assert dq[[.., .., 2]] |> Nx.is_nan() |> Nx.all() |> Nx.to_number() == 1

      # A cache beyond what was written, and a padded query that sees nothing.
      cache =
        spoil.(Nx.transpose(k, axes: [0, 2, 1, 3]) |> Nx.reshape({1, 1, 5, 4}), 4, :nan) |> Nx.reshape({1, 5, 1, 4})

      one = normal({1, 1, 1, 4}, {:f, 32}, 54)

      decode = fn q, cache ->
        mask = Nx.tensor([[1, 1, 1, 0, 0]])
        {out, _, _} = Fast.kv_cache_sdpa_update(q, one, one, cache, cache, 2, mask, 0.5)
        Nx.sum(Nx.multiply(out, out))
      end

      for grad <- Tuple.to_list(Nx.Defn.grad({one, cache}, fn {q, cache} -> decode.(q, cache) end)),
          do: assert(Nx.to_number(Nx.any(Nx.is_nan(grad))) == 0)

      [padded, zeroed] = for value <- [:nan, 0.0], do: spoil.(q, 0, value)
      mask = Nx.tensor([[0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
      loss = fn q, k -> Nx.sum(Nx.pow(Fast.scaled_dot_product_attention(q, k, v, 0.5, mask), 2)) end
      assert Nx.Defn.grad(k, &loss.(padded, &1)) == Nx.Defn.grad(k, &loss.(zeroed, &1))
    end

    # ---- what EMLX's page says and what differs --------------------------------------------------

    test "shape, type and names are those of the first tensor" do
      x = Nx.tensor([[1.0, 2.0]], names: [:batch, :features], type: :bf16)
      weight = Nx.tensor([1.0, 1.0], type: :f32)
      assert %{type: {:bf, 16}, shape: {1, 2}, names: [:batch, :features]} = Fast.rms_norm(x, weight, 1.0e-6)
      jitted = Nx.Defn.jit(&Fast.rms_norm(&1, &2, 1.0e-6)).(x, weight)
      assert jitted.names == [:batch, :features]
    end

    test "positions of any kind and order, at any base, traditional or not" do
      for kind <- [:s, :u], bits <- [8, 16, 32, 64], base <- [10_000, 1.0e6], traditional <- [false, true] do
        a = normal({2, 3, 2, 8}, {:f, 32}, 60)
        ids = Nx.tensor([[7, 7, 0], [1, 100, 2]])
        got = Fast.rope_with_positions(a, Nx.as_type(ids, {kind, bits}), 8, traditional, base, 1.0)
        close(got, rotated(a, ids, 1, 8, traditional, 1.0, inverse(8, base)), 2.0e-6)
      end
    end

    test "a large position keeps its accuracy" do
      a = normal({1, 1, 1, 128}, {:f, 32}, 61)
      got = Fast.rope(a, 128, false, 1.0e6, 1.0, 1_000_000)
      close(got, rotated(a, Nx.tensor([[1_000_000]]), 2, 128, false, 1.0, inverse(128, 1.0e6)), 2.0e-6)
    end

    test "offsets as tensors" do
      a = normal({2, 3, 2, 8}, {:f, 32}, 62)
      expected = Fast.rope(a, 8, false, 10_000, 1.0, 4)

      for offset <- [Nx.tensor(4), Nx.tensor([4]), Nx.tensor([4, 4]), Nx.tensor(4, type: :u8)] do
        assert Fast.rope(a, 8, false, 10_000, 1.0, offset) == expected
      end
    end

    test "what a hidden key holds never matters" do
      q = normal({1, 2, 3, 4}, {:f, 32}, 63)
      k = normal({1, 2, 5, 4}, {:f, 32}, 64)
      mask = Nx.tensor([[1, 1, 1, 0, 0]])
      nan = Nx.broadcast(Nx.Constants.nan(:f32), {1, 2, 2, 4})
      poisoned = Nx.put_slice(k, [0, 0, 3, 0], nan)
      attend = &Fast.scaled_dot_product_attention_causal_key_masked(q, &1, &1, 0.5, mask)
      assert attend.(poisoned) == attend.(k)
    end

    test "the offset of a cache is clamped as Nx.put_slice clamps it" do
      [q, new, cache] = [
        normal({1, 2, 2, 4}, {:f, 32}, 65),
        normal({1, 2, 1, 4}, {:f, 32}, 66),
        normal({1, 5, 1, 4}, {:f, 32}, 67)
      ]

      mask = Nx.broadcast(1, {1, 5})
      update = &Fast.kv_cache_sdpa_update(q, new, new, cache, cache, &1, mask, 0.5)
      assert update.(9) == update.(3)
      assert update.(Nx.tensor([-4])) == update.(0)
      {_, k, _} = update.(Nx.tensor(9, type: :u8))
      assert k == Nx.put_slice(cache, [0, 9, 0, 0], new)
    end

    defn in_defn(x, weight, options \\ []) do
      scale = 1 / Nx.sqrt(Nx.axis_size(x, -1))
      x = Fast.rms_norm(x, weight, options[:eps])
      Fast.scaled_dot_product_attention(x, x, x, scale, causal: true)
    end

    test "numbers may be tensors, and are those inside defn" do
      x = normal({1, 2, 3, 4}, {:f, 32}, 68)
      weight = Nx.broadcast(1.0, {4})
      y = Fast.rms_norm(x, weight, Nx.tensor(1.0e-6))
      assert in_defn(x, weight, eps: 1.0e-6) == Fast.scaled_dot_product_attention_causal(y, y, y, 0.5)
    end

    test "inside while and cond" do
      x = normal({1, 2, 3, 4}, {:f, 32}, 69)

      loop = fn x ->
        Nx.Defn.jit(fn x -> Metalloid.FastTest.loop(x) end).(x)
      end

      expected = Enum.reduce(1..3, x, fn _, x -> Fast.rms_norm(x, nil, 1.0e-6) end)
      assert loop.(x) == expected
    end

    defn loop(x) do
      {_, x} =
        while {i = 0, x}, i < 3 do
          {i + 1, Fast.rms_norm(x, nil, 1.0e-6)}
        end

      x
    end

    test "tensors of another backend, and back" do
      backend = {Metalloid.OtherBackend, client: :here}
      x = normal({2, 3}, {:f, 32}, 70)
      expected = Fast.rms_norm(x, nil, 1.0e-6)
      other = Nx.backend_copy(x, Metalloid.OtherBackend)
      result = Fast.rms_norm(other, nil, 1.0e-6)
      assert %Metalloid.OtherBackend{options: []} = result.data
      assert Nx.to_binary(result) == Nx.to_binary(expected)

      Nx.with_default_backend(backend, fn ->
        assert %Metalloid.OtherBackend{options: [client: :here]} = Fast.rms_norm(other, nil, 1.0e-6).data
        assert %Nx.BinaryBackend{} = Fast.rms_norm(x, nil, 1.0e-6).data
      end)
    end

    test "tensors of the binary backend are read where they lie, and results are not copied" do
      x = normal({64, 64}, {:f, 32}, 71)
      %Nx.Tensor{data: %Nx.BinaryBackend{state: state}} = Fast.swiglu(x, x)
      # A binary of the library's memory refers to the resource that owns it, which is small.
      assert byte_size(state) == 64 * 64 * 4
      assert :binary.referenced_byte_size(state) < 100
    end

    # ---- errors ----------------------------------------------------------------------------------

    test "errors name the operation and the argument, in defn too" do
      x = normal({2, 3, 4}, {:f, 32}, 80)
      q = normal({1, 2, 3, 4}, {:f, 32}, 81)

      for {message, call} <- [
            {~r/^rms_norm: weight/, fn x, _ -> Fast.rms_norm(x, Nx.tensor([1.0, 2.0]), 1.0e-6) end},
            {~r/^rms_norm: eps/, fn x, _ -> Fast.rms_norm(x, nil, -1) end},
            {~r/^rms_norm: x/, fn x, _ -> Fast.rms_norm(Nx.as_type(x, :s32), nil, 0) end},
            {~r/^swiglu: up/, fn x, _ -> Fast.swiglu(x, Nx.slice_along_axis(x, 0, 2, axis: 2)) end},
            {~r/^rope: dims must be even/, fn x, _ -> Fast.rope(x, 3, false, 10_000, 1.0, 0) end},
            {~r/^rope: position_ids/,
             fn x, _ -> Fast.rope_with_positions(x, Nx.tensor([[1, 2]]), 4, false, 10, 1.0) end},
            {~r/^scaled_dot_product_attention: k/, fn x, q -> Fast.scaled_dot_product_attention(q, x, q, 1) end},
            {~r/^scaled_dot_product_attention: q must have rank 4, got 3/,
             fn x, q -> Fast.scaled_dot_product_attention(x, q, q, 1) end},
            {~r/^scaled_dot_product_attention: mask/,
             fn _, q -> Fast.scaled_dot_product_attention(q, q, q, 1, Nx.tensor([[1, 2]])) end},
            {~r/unknown keys \[:sink\]/, fn _, q -> Fast.scaled_dot_product_attention(q, q, q, 1, sink: 1) end}
          ] do
        assert_raise ArgumentError, message, fn -> call.(x, q) end
        assert_raise ArgumentError, message, fn -> Nx.Defn.jit(call).(x, q) end
      end

      assert_raise ArgumentError, ~r/^rms_norm: x is vectorized/, fn ->
        Fast.rms_norm(Nx.vectorize(x, :batch), nil, 1.0e-6)
      end
    end
  end
end
