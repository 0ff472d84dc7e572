defmodule Metalloid.CasesTest do
  # The calls that the C tests make, with the exact results and bounds that they have: METALLOID_TEST_CASES is the
  # folder where those tests wrote them (tests/c/record.c tells the format).
  use ExUnit.Case, async: true

  alias Metalloid.NIF

  @folder System.get_env("METALLOID_TEST_CASES")

  if @folder do
    for path <- Path.wildcard(Path.join(@folder, "*.cases")), File.stat!(path).size > 0 do
      @path path
      test Path.basename(path, ".cases") do
        {run, left_out} = @path |> File.stream!([:raw, read_ahead: 1_000_000]) |> cases() |> check()
        assert run > 0
        IO.puts("  #{Path.basename(@path)}: #{run} calls" <> if(left_out > 0, do: ", #{left_out} left out", else: ""))
      end
    end
  else
    @tag skip: "METALLOID_TEST_CASES is not set: the C tests' cases are left out"
    test "cases of the C tests", do: :ok
  end

  # ---- reading -----------------------------------------------------------------------------------

  defp cases(lines) do
    Stream.chunk_while(
      lines,
      nil,
      fn line, one ->
        case {String.split(line, [" ", "\n"], trim: true), one} do
          {["call", name | words], nil} -> {:cont, new(name, words)}
          {["call", name | words], one} -> {:cont, one, new(name, words)}
          {["input", name, type, extents | hex], one} -> {:cont, put_in(one.inputs[name], tensor(type, extents, hex))}
          {["output", name, type, extents | hex], one} -> {:cont, put_in(one.outputs[name], output(type, extents, hex))}
        end
      end,
      fn one -> {:cont, one, nil} end
    )
  end

  defp new(name, words) do
    %{operation: name, options: Map.new(words, &List.to_tuple(String.split(&1, "="))), inputs: %{}, outputs: %{}}
  end

  @types %{
    "float32" => {:f, 32},
    "float16" => {:f, 16},
    "bfloat16" => {:bf, 16},
    "float64" => {:f, 64},
    "bool" => {:u, 8}
  }

  defp type("int" <> bits), do: {:s, String.to_integer(bits)}
  defp type("uint" <> bits), do: {:u, String.to_integer(bits)}
  defp type(name), do: Map.fetch!(@types, name)

  defp shape("-"), do: {}
  defp shape(extents), do: extents |> String.split("x") |> Enum.map(&String.to_integer/1) |> List.to_tuple()

  defp bytes([]), do: ""
  defp bytes([hex]), do: Base.decode16!(hex, case: :lower)

  defp tensor(type, extents, hex), do: {type, {type(type), shape(extents), bytes(hex)}}

  defp output(type, extents, []), do: {type(type), shape(extents), "", ""}
  defp output(type, extents, [exact, bound]), do: {type(type), shape(extents), bytes([exact]), bytes([bound])}

  # ---- calling -----------------------------------------------------------------------------------

  # An integer mask is added in C and hides in Elixir; a result's type is named once for all results.
  defp check(cases) do
    Enum.reduce(cases, {0, 0}, fn one, {run, left_out} ->
      types = one.outputs |> Map.drop(["logsumexp", "state"]) |> Enum.map(fn {_, output} -> elem(output, 0) end)

      if integer_mask?(one.inputs["mask"], one.operation) or length(Enum.uniq(types)) > 1 do
        {run, left_out + 1}
      else
        results = call(one.operation, one, if(types != [], do: [type: hd(types)], else: []))

        if results == :left_out do
          {run, left_out + 1}
        else
          for {name, output} <- one.outputs, do: compare(one, name, Map.fetch!(results, name), output)
          {run + 1, left_out}
        end
      end
    end)
  end

  defp integer_mask?({type, _}, "scaled_dot_product_attention"), do: String.contains?(type, "int")
  defp integer_mask?(_, _), do: false

  defp call("rms_norm", one, options),
    do: %{"out" => NIF.rms_norm(input(one, "x"), input(one, "weight"), number(one, "eps"), options)}

  defp call("layer_norm", one, options) do
    %{"out" => NIF.layer_norm(input(one, "x"), input(one, "weight"), input(one, "bias"), number(one, "eps"), options)}
  end

  defp call("add_rms_norm", one, options) do
    {sum, out} =
      NIF.add_rms_norm(input(one, "x"), input(one, "residual"), input(one, "weight"), number(one, "eps"), options)

    %{"sum" => sum, "out" => out}
  end

  defp call("add_layer_norm", one, options) do
    [x, residual, weight, bias] = Enum.map(~w(x residual weight bias), &input(one, &1))
    {sum, out} = NIF.add_layer_norm(x, residual, weight, bias, number(one, "eps"), options)
    %{"sum" => sum, "out" => out}
  end

  defp call("swiglu", one, options), do: %{"out" => NIF.swiglu(input(one, "gate"), input(one, "up"), options)}

  defp call("geglu", one, options) do
    options = [approximate: String.to_atom(one.options["approximate"])] ++ options
    %{"out" => NIF.geglu(input(one, "gate"), input(one, "up"), options)}
  end

  defp call("rope", one, options),
    do: %{"out" => NIF.rope(input(one, "x"), number(one, "dims"), rope_options(one) ++ options)}

  defp call("qk_norm_rope", one, options) do
    [q, k, q_weight, k_weight] = Enum.map(~w(q k q_weight k_weight), &input(one, &1))
    options = rope_options(one) ++ options
    {q, k} = NIF.qk_norm_rope(q, k, q_weight, k_weight, number(one, "eps"), number(one, "dims"), options)
    %{"q_out" => q, "k_out" => k}
  end

  defp call("scaled_dot_product_attention", one, options) do
    [q, k, v, mask, key_mask, sinks] = Enum.map(~w(q k v mask key_mask sinks), &input(one, &1))
    logsumexp = one.outputs["logsumexp"] && elem(one.outputs["logsumexp"], 0)

    options =
      [mask: mask, key_mask: key_mask, sinks: sinks, causal: number(one, "causal") == 1] ++
        [causal_offset: number(one, "causal_offset"), window: number(one, "window"), softcap: number(one, "softcap")] ++
        [logsumexp: logsumexp != nil] ++ options

    case NIF.scaled_dot_product_attention(q, k, v, number(one, "scale"), options) do
      {{_, _}, _, _} = out -> %{"out" => out}
      {out, {type, _, _} = logsumexp} when elem(type, 1) in [32, 64] -> %{"out" => out, "logsumexp" => logsumexp}
    end
  end

  defp call("kv_cache_sdpa_update", one, options) do
    [q, new_k, new_v, k, v, key_mask] = Enum.map(~w(q new_k new_v k_cache v_cache key_mask), &input(one, &1))
    offset = number(one, "offset")
    {out, new, _} = NIF.kv_cache_sdpa_update(q, new_k, new_v, k, v, offset, key_mask, number(one, "scale"), options)
    assert elem(new, 1) == elem(k, 1)
    %{"out" => out}
  end

  defp call("cross_entropy", one, options) do
    options = [ignore_index: number(one, "ignore_index")] ++ options
    %{"loss" => NIF.cross_entropy(input(one, "logits"), input(one, "targets"), options)}
  end

  defp call("gated_delta_update", one, options) do
    [q, k, v, gamma, beta, initial, mask] = Enum.map(~w(q k v gamma beta initial_state mask), &input(one, &1))
    {out, state} = NIF.gated_delta_update(q, k, v, gamma, beta, initial, mask, options)
    # C's caller chooses the type of the state; here it is float64 beside a float64 result alone.
    if one.outputs["state"] && elem(one.outputs["state"], 0) != elem(state, 0),
      do: :left_out,
      else: %{"out" => out, "state" => state}
  end

  defp rope_options(one) do
    for name <- ~w(freqs inv_freqs offsets position_ids) do
      {String.to_atom(name), input(one, name)}
    end ++
      [traditional: number(one, "traditional") == 1] ++
      for name <- ~w(time_axis scale base offset), do: {String.to_atom(name), number(one, name)}
  end

  defp input(one, name) do
    with {_, tensor} <- one.inputs[name], do: tensor
  end

  defp number(one, name) do
    with text when text != nil <- one.options[name] do
      case Integer.parse(text) do
        {whole, ""} -> whole
        _ -> String.to_float(text)
      end
    end
  end

  # ---- comparing ---------------------------------------------------------------------------------

  defp compare(one, name, {type, shape, got}, {expected_type, expected_shape, exact, bound}) do
    assert {one.operation, name, type, shape} == {one.operation, name, expected_type, expected_shape}
    compare_elements({one, name, type}, got, exact, bound, 0)
  end

  defp compare_elements(_, "", "", "", _), do: :ok

  defp compare_elements({_, _, {_, bits}} = of, got, exact, bound, i) do
    bytes = div(bits, 8)
    <<x::binary-size(bytes), got::binary>> = got
    <<y::binary-size(8), exact::binary>> = exact
    <<limit::binary-size(8), bound::binary>> = bound
    x = decode(elem(of, 2), x)
    y = decode({:f, 64}, y)

    unless near?(x, y, decode({:f, 64}, limit), elem(of, 2)) do
      {one, name, _} = of
      flunk("#{one.operation}: #{name}[#{i}] is #{inspect(x)} instead of #{inspect(y)}: #{inspect(one, limit: 20)}")
    end

    compare_elements(of, got, exact, bound, i + 1)
  end

  defp near?(same, same, _, _), do: true
  defp near?(x, y, limit, _) when is_float(x) and is_float(y) and is_float(limit), do: abs(x - y) <= limit
  # Beyond the largest number of the type a result is infinite.
  defp near?(:infinity, y, limit, type) when is_float(y), do: y + limit >= largest(type)
  defp near?(:neg_infinity, y, limit, type) when is_float(y), do: y - limit <= -largest(type)
  defp near?(x, :infinity, _, type) when is_float(x), do: x >= largest(type) * 0.99
  defp near?(_, _, _, _), do: false

  defp largest({:f, 16}), do: 65504.0
  defp largest({:bf, 16}), do: 3.3895313892515355e38
  defp largest({:f, 32}), do: 3.4028234663852886e38
  defp largest({:f, 64}), do: 1.7976931348623157e308

  # The VM's floats are finite.
  defp decode({:bf, 16}, <<bits::native-16>>), do: decode({:f, 32}, <<bits::16, 0::16>>, :big)
  defp decode(type, bytes), do: decode(type, bytes, System.endianness())

  defp decode({:f, bits}, bytes, endianness) do
    {exponent, mantissa} = %{16 => {5, 10}, 32 => {8, 23}, 64 => {11, 52}}[bits]

    big =
      if endianness == :little,
        do: bytes |> :binary.bin_to_list() |> Enum.reverse() |> :binary.list_to_bin(),
        else: bytes

    <<sign::1, e::size(exponent), m::size(mantissa)>> = big

    cond do
      e < Bitwise.bsl(1, exponent) - 1 ->
        <<value::float-size(bits)>> = big
        value

      m != 0 ->
        :nan

      sign == 1 ->
        :neg_infinity

      true ->
        :infinity
    end
  end
end
