# Metalloid.Fast beside the same formula in a defn: on Nx's binary backend, and with EXLA where it is.
#
#     mix run bench/fast.exs [NAME]...
#
# Medians of rounds that take turns. The binary backend is interpreted; what it shows is what a model without a compiler gains.
Enum.each([:nx, :exla], &Application.ensure_all_started/1)

defmodule Bench do
  import Nx.Defn

  defn rms_norm(x, weight) do
    x * Nx.rsqrt(Nx.mean(x * x, axes: [-1], keep_axes: true) + 1.0e-6) * weight
  end

  defn(swiglu(gate, up), do: gate * Nx.sigmoid(gate) * up)

  defn rope(x, positions, opts \\ []) do
    half = div(Nx.axis_size(x, -1), 2)
    inv_freq = 1 / Nx.pow(opts[:base], Nx.iota({half}) / half)
    angle = Nx.new_axis(Nx.new_axis(positions, -1) * inv_freq, 2)
    angle = Nx.concatenate([angle, angle], axis: -1)
    turned = Nx.concatenate([-x[[.., .., .., half..-1//1]], x[[.., .., .., 0..(half - 1)//1]]], axis: -1)
    x * Nx.cos(angle) + turned * Nx.sin(angle)
  end

  defn attention(q, k, v) do
    scores = Nx.dot(q, [3], [0, 1], k, [3], [0, 1]) / Nx.sqrt(Nx.axis_size(q, -1))
    {queries, keys} = {Nx.axis_size(q, 2), Nx.axis_size(k, 2)}
    seen = Nx.iota({queries, 1}) + (keys - queries) >= Nx.iota({1, keys})
    scores = Nx.select(Nx.broadcast(seen, Nx.shape(scores)), scores, -1.0e9)
    weights = Nx.exp(scores - Nx.reduce_max(scores, axes: [3], keep_axes: true))
    weights = weights / Nx.sum(weights, axes: [3], keep_axes: true)
    Nx.dot(weights, [3], [0, 1], v, [2], [0, 1])
  end

  def median(list), do: Enum.at(Enum.sort(list), div(length(list), 2))

  def time(fun) do
    fun.()

    times =
      for _ <- 1..5 do
        {once, _} = :timer.tc(fun)
        count = max(1, div(20_000, max(once, 1)))
        {us, _} = :timer.tc(fn -> for(_ <- 1..count, do: fun.()) end)
        us / count
      end

    median(times)
  end

  def show(us) when us >= 10_000, do: "#{Float.round(us / 1000, 1)} ms"
  def show(us), do: "#{Float.round(us * 1.0, 1)} us"
end

normal = fn shape -> Nx.Random.key(1) |> Nx.Random.normal(shape: shape) |> elem(0) end
x = normal.({1, 128, 1024})
row = normal.({1, 1, 1024})
weight = normal.({1024})
[gate, up] = [normal.({1, 128, 3072}), normal.({1, 128, 3072})]
bt = normal.({1, 128, 16, 128})
positions = Nx.iota({1, 128}, axis: 1)
[q, kv] = [normal.({1, 8, 64, 64}), normal.({1, 8, 64, 64})]
[one, cache] = [normal.({1, 8, 1, 64}), normal.({1, 8, 512, 64})]
scale = 1 / 8

cases = [
  {"rms_norm, one token of 1024", [row, weight], &Metalloid.Fast.rms_norm(&1, &2, 1.0e-6), &Bench.rms_norm/2},
  {"rms_norm, 128 tokens of 1024", [x, weight], &Metalloid.Fast.rms_norm(&1, &2, 1.0e-6), &Bench.rms_norm/2},
  {"swiglu, 128 tokens of 3072", [gate, up], &Metalloid.Fast.swiglu/2, &Bench.swiglu/2},
  {"rope, 128 tokens, 16 heads of 128", [bt, positions],
   &Metalloid.Fast.rope_with_positions(&1, &2, 128, false, 1.0e6, 1.0), &Bench.rope(&1, &2, base: 1.0e6)},
  {"attention, causal, 64 tokens, 8 heads of 64", [q, kv, kv],
   &Metalloid.Fast.scaled_dot_product_attention_causal(&1, &2, &3, scale), &Bench.attention/3},
  {"attention, a token over 512, 8 heads of 64", [one, cache, cache],
   &Metalloid.Fast.scaled_dot_product_attention_causal(&1, &2, &3, scale), &Bench.attention/3}
]

exla? = Code.ensure_loaded?(EXLA)
IO.puts("Metalloid #{Metalloid.version()} (#{Metalloid.cpu_isa()}, #{Metalloid.num_threads()} threads), float32")
unless exla?, do: IO.puts("EXLA is not found: its column is left out")

for {name, tensors, fused, plain} <- cases,
    System.argv() == [] or Enum.any?(System.argv(), &String.contains?(name, &1)) do
  fused = Nx.Defn.jit(fused, compiler: Nx.Defn.Evaluator)
  evaluated = Nx.Defn.jit(plain, compiler: Nx.Defn.Evaluator)

  difference =
    Nx.subtract(apply(fused, tensors), apply(evaluated, tensors)) |> Nx.abs() |> Nx.reduce_max() |> Nx.to_number()

  if difference > 1.0e-3, do: raise("#{name}: the two differ by #{difference}")

  ours = Bench.time(fn -> apply(fused, tensors) end)
  theirs = Bench.time(fn -> apply(evaluated, tensors) end)
  line = "#{name}: Metalloid #{Bench.show(ours)}, binary backend #{Bench.show(theirs)} (#{round(theirs / ours)}x)"

  if exla? do
    compiled = Nx.Defn.jit(plain, compiler: EXLA)
    tensors = Enum.map(tensors, &Nx.backend_copy(&1, EXLA.Backend))
    us = Bench.time(fn -> apply(compiled, tensors) end)
    IO.puts(line <> ", EXLA #{Bench.show(us)} (#{Float.round(us / ours, 2)}x)")
  else
    IO.puts(line)
  end
end
