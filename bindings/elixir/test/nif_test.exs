defmodule Metalloid.NIFTest do
  use ExUnit.Case, async: true

  alias Metalloid.NIF

  doctest Metalloid
  doctest Metalloid.NIF

  defp floats(values), do: for(value <- values, into: "", do: <<value::float-native-32>>)
  defp tensor(shape, value \\ 0.5), do: {{:f, 32}, shape, floats(List.duplicate(value, Tuple.product(shape)))}

  defp integers(shape, type \\ {:s, 64}),
    do: {type, shape, :binary.copy(<<0::size(elem(type, 1))>>, Tuple.product(shape))}

  defp values({{:f, 32}, _, binary}), do: for(<<value::float-native-32 <- binary>>, do: value)

  # Every NIF that takes tensors: its name, good arguments, and which of them are tensors.
  defp calls do
    x = tensor({2, 3, 4})
    w = tensor({4})
    q = tensor({1, 2, 3, 4})
    bthd = tensor({1, 3, 2, 4})
    cache = tensor({1, 5, 2, 4})

    [
      {:rms_norm, [x, w, 1.0e-5, []]},
      {:layer_norm, [x, w, w, 1.0e-5, []]},
      {:add_rms_norm, [x, x, w, 1.0e-5, []]},
      {:add_layer_norm, [x, x, w, w, 1.0e-5, []]},
      {:swiglu, [x, x, []]},
      {:geglu, [x, x, [approximate: :tanh]]},
      {:rope, [x, 4, [position_ids: integers({2, 3})]]},
      {:qk_norm_rope, [q, q, w, w, 1.0e-5, 4, [inv_freqs: tensor({2})]]},
      {:scaled_dot_product_attention, [q, q, q, 0.5, [mask: integers({3, 3}), key_mask: integers({1, 3}, {:u, 8})]]},
      {:kv_cache_sdpa_update, [bthd, bthd, bthd, cache, cache, 1, integers({1, 5}), 0.5, []]},
      {:cross_entropy, [x, integers({2, 3}), []]},
      {:gated_delta_update, [bthd, bthd, bthd, tensor({1, 3, 2}), tensor({1, 3, 2}), nil, integers({1, 3}), []]}
    ]
  end

  defp tensor?({type, shape, binary}), do: is_tuple(type) and is_tuple(shape) and is_binary(binary)
  defp tensor?(_), do: false

  # What can be wrong with a term that should be a tensor.
  defp bad({type, shape, binary}) do
    rank = tuple_size(shape)
    size = byte_size(binary)

    [
      :none,
      1,
      "binary",
      [],
      {},
      {type, shape},
      {type, shape, binary, binary},
      {shape, type, binary},
      {type, Tuple.to_list(shape), binary},
      {type, shape, :binary.bin_to_list(binary)},
      {type, shape, <<binary::binary, 1::1>>},
      {type, shape, binary_part(binary, 0, size - 1)},
      {type, shape, <<binary::binary, 0>>},
      {type, shape, ""},
      {:f32, shape, binary},
      {{:f, 8}, shape, binary},
      {{:c, 64}, shape, binary},
      {{:f, :x}, shape, binary},
      {{:f, -32}, shape, binary},
      {{"f", 32}, shape, binary},
      {{:s, 32, 1}, shape, binary},
      {type, put_elem(shape, rank - 1, -1), binary},
      {type, put_elem(shape, 0, -4), binary},
      {type, put_elem(shape, 0, 1.0), binary},
      {type, put_elem(shape, 0, :batch), binary},
      {type, put_elem(shape, 0, Bitwise.bsl(1, 62)), binary},
      {type, put_elem(shape, 0, Bitwise.bsl(1, 64)), binary},
      {type, put_elem(shape, 0, Bitwise.bsl(1, 200)), binary},
      {type, Tuple.duplicate(Bitwise.bsl(1, 62), 3), binary},
      {type, Tuple.duplicate(1, 65), binary_part(binary, 0, div(elem(type, 1), 8))},
      {type, Tuple.duplicate(1, 1000), binary_part(binary, 0, div(elem(type, 1), 8))},
      {{:s, 16}, shape, :binary.copy(<<0, 0>>, Tuple.product(shape))},
      {{:f, 32}, :erlang.append_element(shape, 3), floats(List.duplicate(0.5, 3 * Tuple.product(shape)))},
      {{:f, 32}, {}, floats([0.5])}
    ]
  end

  test "bad tensors of every kind are refused by every NIF, each with a message that names the operation" do
    refused =
      for {name, arguments} <- calls(), {argument, i} <- Enum.with_index(arguments), tensor?(argument) do
        apply(NIF, name, arguments)

        for bad <- bad(argument) do
          # A few are good elsewhere: an integer tensor as positions, one of another rank as a mask or a norm's input.
          case result(name, List.replace_at(arguments, i, bad)) do
            {:error, message} ->
              assert message =~ ~r/^#{name}: /
              refute message =~ "\n"
              1

            {:ok, _} ->
              assert match?({{kind, _}, _, _} when kind in [:s, :f], bad), "#{name} took #{inspect(bad)}"
              0
          end
        end
      end

    assert refused |> List.flatten() |> Enum.sum() > 700
  end

  test "bad tensors in options are refused" do
    x = tensor({2, 3, 4})
    q = tensor({1, 2, 3, 4})

    for {name, arguments, option, good} <- [
          {:rope, [x, 4], :freqs, tensor({2})},
          {:rope, [x, 4], :inv_freqs, tensor({2})},
          {:rope, [x, 4], :offsets, integers({2})},
          {:rope, [x, 4], :position_ids, integers({2, 3})},
          {:scaled_dot_product_attention, [q, q, q, 1], :mask, tensor({3, 3})},
          {:scaled_dot_product_attention, [q, q, q, 1], :key_mask, integers({1, 3})},
          {:scaled_dot_product_attention, [q, q, q, 1], :sinks, tensor({2})}
        ] do
      assert {:ok, _} = result(name, arguments ++ [[{option, good}]])

      for bad <- bad(good) do
        with {:error, message} <- result(name, arguments ++ [[{option, bad}]]), do: assert(message =~ ~r/^#{name}: /)
      end
    end
  end

  test "bad numbers and options are refused, and say which" do
    x = tensor({2, 3, 4})
    q = tensor({1, 2, 3, 4})

    for {expected, name, arguments} <- [
          {"rms_norm: eps must be a number, got nil", :rms_norm, [x, nil, nil, []]},
          {"rms_norm: eps must be a number, got x", :rms_norm, [x, nil, :x, []]},
          {"rms_norm: eps", :rms_norm, [x, nil, -1.0, []]},
          {"rms_norm: eps", :rms_norm, [x, nil, Bitwise.bsl(1, 80), []]},
          {"rms_norm: the options must be a keyword list", :rms_norm, [x, nil, 0, :x]},
          {"rms_norm: the options must be a keyword list", :rms_norm, [x, nil, 0, [:x]]},
          {"rms_norm: the options must be a keyword list", :rms_norm, [x, nil, 0, [{:type, {:f, 32}} | 1]]},
          {"rms_norm: there is no option eps", :rms_norm, [x, nil, 0, [eps: 1]]},
          {"rms_norm: type must have", :rms_norm, [x, nil, 0, [type: :f32]]},
          {"rms_norm: out must be float32", :rms_norm, [x, nil, 0, [type: {:s, 32}]]},
          {"rope: dims", :rope, [x, 3, []]},
          {"rope: dims", :rope, [x, 6, []]},
          {"rope: dims must be an integer", :rope, [x, 4.0, []]},
          {"rope: traditional must be false or true, got 1", :rope, [x, 4, [traditional: 1]]},
          {"rope: time_axis must be", :rope, [tensor({1, 1, 1, 4}), 4, [time_axis: 0]]},
          {"rope: scale", :rope, [x, 4, [scale: "1"]]},
          {"rope: base", :rope, [x, 4, [base: -1]]},
          {"rope: ", :rope, [x, 4, [base: 10, freqs: tensor({2})]]},
          {"rope: offset must be an integer of 64 bits", :rope, [x, 4, [offset: Bitwise.bsl(1, 64)]]},
          {"rope: ", :rope, [x, 4, [offset: Bitwise.bsl(1, 40)]]},
          {"geglu: approximate must be none or tanh, got erf", :geglu, [x, x, [approximate: :erf]]},
          {"scaled_dot_product_attention: scale", :scaled_dot_product_attention, [q, q, q, :x, []]},
          {"scaled_dot_product_attention: window", :scaled_dot_product_attention, [q, q, q, 1, [window: 0]]},
          {"scaled_dot_product_attention: softcap", :scaled_dot_product_attention, [q, q, q, 1, [softcap: 0.0]]},
          {"scaled_dot_product_attention: softcap", :scaled_dot_product_attention, [q, q, q, 1, [softcap: -1]]},
          {"scaled_dot_product_attention: causal", :scaled_dot_product_attention, [q, q, q, 1, [causal: :maybe]]},
          {"cross_entropy: targets", :cross_entropy, [x, {{:s, 8}, {2, 3}, <<0, 1, 2, 3, 4, 0>>}, []]},
          {"cross_entropy: ignore_index", :cross_entropy, [x, integers({2, 3}), [ignore_index: 0.5]]}
        ] do
      assert {:error, message} = result(name, arguments)
      assert message =~ expected
      refute message =~ "\n"
    end

    assert_raise ArgumentError, ~r/^set_num_threads: /, fn -> NIF.set_num_threads(-1) end
    assert_raise ArgumentError, ~r/^set_num_threads: /, fn -> NIF.set_num_threads(:many) end
  end

  test "a result that no memory holds raises" do
    q = {{:f, 32}, {1, 1, Bitwise.bsl(1, 50), 0}, ""}
    k = {{:f, 32}, {1, 1, 1, 0}, ""}

    assert_raise RuntimeError, ~r/^scaled_dot_product_attention: there is no memory/, fn ->
      NIF.scaled_dot_product_attention(q, k, tensor({1, 1, 1, 1000}), 1.0)
    end
  end

  test "empty tensors" do
    assert NIF.rms_norm({{:f, 32}, {0, 4}, ""}, nil, 0) == {{:f, 32}, {0, 4}, ""}
    huge = {{:f, 16}, {Bitwise.bsl(1, 40), 0, 2}, ""}
    assert NIF.swiglu(huge, huge) == huge
    empty = {{:f, 32}, {1, 2, 0, 4}, ""}
    assert {_, {1, 2, 3, 4}, out} = NIF.scaled_dot_product_attention(tensor({1, 2, 3, 4}), empty, empty, 1)
    assert out == :binary.copy(<<0>>, 96)
  end

  test "binaries that are not aligned to their elements, parts of others among them" do
    expected = NIF.rms_norm(tensor({100, 7}, 1.5), tensor({7}, 2.0), 0)

    for shift <- 0..7 do
      padding = :binary.copy(<<255>>, shift)
      {type, shape, binary} = tensor({100, 7}, 1.5)
      <<_::binary-size(shift), x::binary>> = padding <> binary
      bits = Bitwise.band(shift, 7)
      <<_::size(bits), w::binary-size(28), _::bits>> = <<0::size(bits), floats(List.duplicate(2.0, 7))::binary, 0>>
      assert NIF.rms_norm({type, shape, x}, {{:f, 32}, {7}, w}, 0) == expected
    end
  end

  test "an integer mask of any width hides where it is 0" do
    q = tensor({1, 1, 1, 1}, 1.0)
    k = tensor({1, 1, 4, 1}, 1.0)
    v = {{:f, 32}, {1, 1, 4, 1}, floats([1.0, 2.0, 4.0, 8.0])}

    for kind <- [:s, :u], bits <- [8, 16, 32, 64] do
      mask = for i <- [0, 1, 2, -1], into: "", do: <<i::integer-native-size(bits)>>

      for option <- [mask: {{kind, bits}, {1, 4}, mask}, key_mask: {{kind, bits}, {1, 4}, mask}] do
        assert [out] = values(NIF.scaled_dot_product_attention(q, k, v, 1, [option]))
        assert_in_delta out, 14 / 3, 1.0e-5
      end
    end

    # Of 256: only the lowest byte is 0.
    assert [out] =
             values(NIF.scaled_dot_product_attention(q, k, v, 1, mask: {{:s, 16}, {1, 4}, <<0::48, 256::native-16>>}))

    assert_in_delta out, 8.0, 1.0e-5
  end

  test "EMLX's rule for a padded prompt" do
    q = tensor({1, 1, 2, 1}, 0.0)
    k = tensor({1, 1, 3, 1}, 0.0)
    v = {{:f, 32}, {1, 1, 3, 1}, floats([1.0, 2.0, 6.0])}
    mask = fn bytes -> [causal: :key_masked, key_mask: {{:u, 8}, {1, 3}, bytes}] end
    # All visible: the last query sees the last key. Some hidden: query i sees keys up to i.
    assert values(NIF.scaled_dot_product_attention(q, k, v, 1, mask.(<<1, 1, 1>>))) == [1.5, 3.0]
    assert values(NIF.scaled_dot_product_attention(q, k, v, 1, mask.(<<1, 1, 0>>))) == [1.0, 1.5]
    assert values(NIF.scaled_dot_product_attention(q, k, v, 1, mask.(<<0, 1, 1>>))) == [0.0, 2.0]
    one = tensor({1, 1, 1, 1}, 0.0)
    assert values(NIF.scaled_dot_product_attention(one, k, v, 1, mask.(<<1, 0, 1>>))) == [3.5]
  end

  test "time_axis: 1 is the same attention on {B, T, N, D}" do
    q = {{:f, 32}, {1, 2, 3, 2}, floats(for i <- 1..12, do: i / 7)}
    k = {{:f, 32}, {1, 4, 1, 2}, floats(for i <- 1..8, do: i / 5)}

    transposed = fn {type, {1, t, n, 2}, binary} ->
      rows = for <<row::binary-size(8) <- binary>>, do: row
      {type, {1, n, t, 2}, for(h <- 0..(n - 1), i <- 0..(t - 1), into: "", do: Enum.at(rows, i * n + h))}
    end

    {out, logsumexp} = NIF.scaled_dot_product_attention(q, k, k, 0.7, time_axis: 1, causal: true, logsumexp: true)
    [q, k, expected] = Enum.map([q, k, out], transposed)
    assert NIF.scaled_dot_product_attention(q, k, k, 0.7, causal: true, logsumexp: true) == {expected, logsumexp}
  end

  test "the caches given to kv_cache_sdpa_update stay as they were" do
    cache = tensor({1, 5, 2, 4})
    {_, _, before} = cache
    before = :binary.copy(before)
    new = tensor({1, 1, 2, 4}, 7.0)
    {_, {_, _, k}, _} = NIF.kv_cache_sdpa_update(tensor({1, 1, 2, 4}), new, new, cache, cache, 4, nil, 0.5)
    assert elem(cache, 2) == before
    assert binary_part(k, 0, 128) == binary_part(before, 0, 128)
    assert binary_part(k, 128, 32) == elem(new, 2)

    for offset <- [-1, 5, Bitwise.bsl(1, 62)] do
      assert_raise ArgumentError, ~r/^kv_cache_sdpa_update: offset/, fn ->
        NIF.kv_cache_sdpa_update(new, new, new, cache, cache, offset, nil, 0.5)
      end
    end
  end

  test "short calls run where the caller is, long ones on a dirty scheduler, with the same result" do
    row = tensor({1, 64}, 1.5)
    rows = tensor({10_000, 64}, 1.5)
    {_, _, short} = NIF.rms_norm(row, nil, 1.0e-6)
    {_, _, long} = NIF.rms_norm(rows, nil, 1.0e-6)
    assert long == :binary.copy(short, 10_000)
  end

  test "100 processes at once" do
    x = tensor({64, 512}, 0.25)
    q = tensor({1, 4, 32, 16}, 0.25)
    norm = NIF.rms_norm(x, nil, 1.0e-6)
    attention = NIF.scaled_dot_product_attention(q, q, q, 0.25, causal: true)

    1..100
    |> Enum.map(fn _ ->
      Task.async(fn ->
        for _ <- 1..20 do
          assert NIF.rms_norm(x, nil, 1.0e-6) == norm
          assert NIF.scaled_dot_product_attention(q, q, q, 0.25, causal: true) == attention
          assert_raise ArgumentError, fn -> NIF.rope(x, 2) end
        end
      end)
    end)
    |> Task.await_many(60_000)
  end

  test "a result outlives the process that called" do
    x = tensor({64, 512}, 3.0)
    {_, _, binary} = Task.await(Task.async(fn -> NIF.rms_norm(x, nil, 0) end))
    :erlang.garbage_collect()
    assert Enum.all?(for(<<value::float-native-32 <- binary>>, do: value), &(abs(&1 - 1) < 1.0e-6))
  end

  defp result(name, arguments) do
    {:ok, apply(NIF, name, arguments)}
  rescue
    error in ArgumentError -> {:error, error.message}
  end
end
