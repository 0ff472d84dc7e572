defmodule Metalloid.MemoryTest do
  # Alone, for it looks at the whole process.
  use ExUnit.Case, async: false

  alias Metalloid.NIF

  defp tensor(shape), do: {{:f, 32}, shape, :binary.copy(<<0.5::float-native-32>>, Tuple.product(shape))}

  @tag timeout: 600_000
  test "memory stays flat over 160,000 calls, refused ones among them" do
    x = tensor({1, 256})
    wide = tensor({4, 1024})
    <<_, unaligned::binary>> = <<0>> <> elem(x, 2)
    key_mask = {{:s, 64}, {1, 3}, :binary.copy(<<0>>, 24)}
    q = tensor({1, 2, 3, 4})

    kernel =
      NIF.kernel_create("twice", ["x"], ["y"], "y[thread_position_in_grid.x] = x[thread_position_in_grid.x] * 2;")

    wrong = NIF.kernel_create("wrong", ["x"], ["y"], "y[0] = z;")
    launch = &NIF.kernel_launch(&1, [&2], [{:f, 32}], [{1, 256}], {256, 1, 1}, {64, 1, 1})

    round = fn times ->
      Task.await(
        Task.async(fn ->
          for _ <- 1..times do
            NIF.rms_norm(x, nil, 1.0e-6)
            NIF.rms_norm(wide, nil, 1.0e-6)
            NIF.swiglu({{:f, 32}, {1, 256}, unaligned}, x)
            NIF.scaled_dot_product_attention(q, q, q, 0.5, key_mask: key_mask, mask: key_mask, logsumexp: true)
            assert_raise ArgumentError, fn -> NIF.rope({{:f, 32}, {1, 1, 256}, unaligned}, 7) end
            launch.(kernel, {{:f, 32}, {1, 256}, unaligned})
            assert_raise ArgumentError, fn -> launch.(wrong, :x) end
            NIF.kernel_create("never_run", ["x"], ["y"], "y[0] = x[0];", header: "// nothing")
          end

          :ok
        end),
        :infinity
      )

      :erlang.garbage_collect()
      resident()
    end

    settled = round.(4_000)
    later = round.(16_000)
    assert later - settled < 8_000, "resident memory grew from #{settled} to #{later} KiB over 128,000 calls"
  end

  # KiB of the VM in memory: what the library allocates is not in :erlang.memory().
  defp resident do
    [_, kib] = Regex.run(~r/VmRSS:\s+(\d+) kB/, File.read!("/proc/self/status"))
    String.to_integer(kib)
  end
end
