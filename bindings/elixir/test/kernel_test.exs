defmodule Metalloid.KernelTest do
  use ExUnit.Case, async: true

  import ExUnit.CaptureIO

  alias Metalloid.{Kernel, NIF}

  doctest Metalloid.Kernel

  defp floats(values), do: for(value <- values, into: "", do: <<value::float-native-32>>)
  defp tensor(values), do: {{:f, 32}, {length(values)}, floats(values)}
  defp values({{:f, bits}, _, binary}), do: for(<<value::float-native-size(bits) <- binary>>, do: value)
  defp values({{:s, bits}, _, binary}), do: for(<<value::signed-native-size(bits) <- binary>>, do: value)
  defp values({{:u, bits}, _, binary}), do: for(<<value::native-size(bits) <- binary>>, do: value)

  # Where Nx is, a call without tensors gives Nx's.
  defp values(%{type: type, shape: shape} = tensor), do: values({type, shape, apply(Nx, :to_binary, [tensor])})

  # One output, by the name of y.
  defp run(source, inputs, n, type, options \\ []) do
    {making, options} = Keyword.split(options, [:header, :atomic_outputs, :compile_options, :debug_options])
    names = for i <- 0..(length(inputs) - 1)//1, do: "x#{i}"
    kernel = Kernel.metal("test", [input_names: names, output_names: ["y"], source: source] ++ making)

    {y} =
      Kernel.call(
        kernel,
        Keyword.merge(
          [inputs: inputs, output_shapes: [{n}], output_dtypes: [type], grid: {n, 1, 1}, threadgroup: {32, 1, 1}],
          options
        )
      )

    values(y)
  end

  @twice "uint i = thread_position_in_grid.x; y[i] = 2 * x0[i];"

  test "templates, headers, several outputs, every type" do
    x = tensor(for i <- 1..32, do: i / 4)
    source = "uint i = thread_position_in_grid.x; y[i] = T(helper(x0[i]) * n) + (flag ? 1 : 0);"
    header = "float helper(float x) { return x * x; }"

    for {type, dtype} <- [{{:f, 32}, :f32}, {{:f, 16}, :f16}, {{:s, 32}, :s32}, {{:s, 64}, {:s, 64}}, {{:u, 8}, :u8}] do
      result = run(source, [x], 32, type, header: header, template: [T: dtype, n: 3, flag: true])

      for {value, i} <- Enum.with_index(result, 1) do
        exact = i / 4 * (i / 4) * 3

        if elem(type, 0) == :f,
          do: assert_in_delta(value, exact + 1, exact / 1000),
          else: assert(value == trunc(exact) + 1)
      end
    end

    kernel =
      Kernel.metal(:parts,
        input_names: [:z, :x],
        output_names: [:re, :positive, :halved],
        source: "uint i = thread_position_in_grid.x; re[i] = z[i].real; positive[i] = x[i] > 0; halved[i] = x[i] / 2;"
      )

    z = {{:c, 64}, {2}, floats([1.0, 2.0, 3.0, 4.0])}

    assert {{_, {2}, re}, {{:u, 8}, {1, 2}, <<0, 1>>}, {{:bf, 16}, {2, 1}, halved}} =
             Kernel.call(kernel,
               inputs: [z, tensor([-1.0, 1.0])],
               output_shapes: [{2}, {1, 2}, {2, 1}],
               output_dtypes: [:f32, :bool, :bf16],
               grid: {2, 1, 1},
               threadgroup: {2, 1, 1}
             )

    assert re == floats([1.0, 3.0])
    assert halved == <<0xBF00::native-16, 0x3F00::native-16>>
  end

  test "numbers and booleans are of rank 0, with MLX's types" do
    source = "y[0] = x0 + 1; y[1] = x1 * 2; y[2] = x2 ? 5 : 6; y[3] = float(x3 >> 40); y[4] = x4;"
    source = source <> " y[5] = sizeof(x0) * 100 + sizeof(x1) * 10 + sizeof(x3);"
    inputs = [7, 0.25, false, Bitwise.bsl(3, 40), :neg_infinity]
    result = run(String.replace(source, "x4;", "isinf(x4) && x4 < 0;"), inputs, 6, {:f, 32}, grid: {1, 1, 1})
    assert result == [8.0, 0.5, 6.0, 3.0, 1.0, 448.0]
  end

  test "threadgroups, barriers, simdgroups, a grid that is no multiple" do
    source = """
    threadgroup float part[4];
    uint i = thread_position_in_grid.x;
    float sum = simd_sum(x0[i]);
    if (thread_index_in_simdgroup == 0) part[simdgroup_index_in_threadgroup] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float total = 0;
    for (uint s = 0; s < simdgroups_per_threadgroup; s++) total += part[s];
    y[i] = total;
    """

    result = run(source, [tensor(List.duplicate(1.0, 200))], 200, {:f, 32}, threadgroup: {128, 1, 1})
    assert result == List.duplicate(128.0, 128) ++ List.duplicate(72.0, 72)
  end

  test "init_value and atomic outputs" do
    source = "atomic_fetch_add_explicit(&y[thread_position_in_grid.x % 3], 1, memory_order_relaxed);"
    options = [atomic_outputs: true, init_value: 10, grid: {300, 1, 1}, threadgroup: {64, 1, 1}]
    assert run(source, [], 4, {:s, 32}, options) == [110, 110, 110, 10]

    kernel = NIF.kernel_create("fill", [], ["y"], "")

    for {value, bits} <- [{:infinity, 0x7F800000}, {:neg_infinity, 0xFF800000}, {1.5, 0x3FC00000}, {2, 0x40000000}] do
      assert NIF.kernel_launch(kernel, [], [{:f, 32}], [{2}], {1, 1, 1}, {1, 1, 1}, init_value: value) ==
               {{{:f, 32}, {2}, <<bits::native-32, bits::native-32>>}}
    end

    nan = NIF.kernel_launch(kernel, [], [{:f, 32}], [{}], {1, 1, 1}, {1, 1, 1}, init_value: :nan)
    assert {{{:f, 32}, {}, <<0x7FC00000::native-32>>}} = nan
  end

  test "binaries that are not aligned" do
    <<_, unaligned::binary>> = <<0>> <> floats([1.0, 2.0, 3.0])
    assert run(@twice, [{{:f, 32}, {3}, unaligned}], 3, {:f, 32}) == [2.0, 4.0, 6.0]
  end

  test "as many inputs and outputs as the library has" do
    [inputs, outputs] = for prefix <- ~w(a b), do: for(i <- 1..64, do: "#{prefix}#{i}")
    kernel = NIF.kernel_create("many", inputs, outputs, Enum.map_join(1..64, "\n", &"b#{&1}[0] = a#{&1} + 1;"))
    types = List.duplicate({:s, 32}, 64)
    results = NIF.kernel_launch(kernel, Enum.to_list(1..64), types, List.duplicate({1}, 64), {1, 1, 1}, {1, 1, 1})
    assert results |> Tuple.to_list() |> Enum.map(&values/1) == for(i <- 1..64, do: [i + 1])
    one = ["y"]
    assert_raise ArgumentError, ~r/input_names/, fn -> NIF.kernel_create("k", inputs ++ ["c"], one, "") end
  end

  test "the source, printed or not" do
    kernel = Kernel.metal("shown", input_names: ["x0"], output_names: ["y"], source: @twice)
    call = [inputs: [tensor([1.0])], output_shapes: [{1}], output_dtypes: [:f32]]
    assert Kernel.source(kernel, call) =~ "[[kernel]]"
    assert Kernel.source(kernel, call) =~ @twice
    assert Kernel.source(kernel, [translated: true] ++ call) =~ "float"
    run = call ++ [grid: {1, 1, 1}, threadgroup: {1, 1, 1}, verbose: true]
    assert capture_io(fn -> Kernel.call(kernel, run) end) =~ "Generated source code for `shown`"
  end

  test "what does not compile, with the compiler's words and the author's lines" do
    error = assert_raise RuntimeError, fn -> run("float a = 1;\ny[0] = a + undeclared_name;", [], 1, {:f, 32}) end
    assert error.message =~ "kernel test does not compile"
    assert error.message =~ "undeclared_name"
    assert error.message =~ "source:2"

    error =
      assert_raise RuntimeError, fn -> run("y[0] = f();", [], 1, {:f, 32}, header: "\nint f() { return g(); }") end

    assert error.message =~ "header:2"
  end

  test "what is stopped while it runs" do
    assert_raise RuntimeError, ~r/iterations/, fn ->
      run("int n = 0; while (n >= 0) { n = n == 5 ? 0 : n + 1; y[0] = n; }", [], 1, {:s, 32},
        debug_options: [max_iterations: 100]
      )
    end

    assert_raise RuntimeError, ~r/barrier/, fn ->
      run(
        "if (thread_position_in_grid.x < 8) { threadgroup_barrier(mem_flags::mem_none); y[0] = 1; }",
        [],
        32,
        {:s, 32}
      )
    end
  end

  test "no compiler: an error that says what to do" do
    root = Path.dirname(Path.dirname(to_string(:code.priv_dir(:metalloid))))

    program = ~S"""
    kernel = Metalloid.NIF.kernel_create("k", [], ["y"], "y[0] = 123456;")
    try do
      Metalloid.NIF.kernel_launch(kernel, [], [{:f, 32}], [{1}], {1, 1, 1}, {1, 1, 1})
    rescue
      error in RuntimeError -> IO.puts(error.message)
    end
    """

    environment = [
      {"METALLOID_CXX", "/nowhere/clang"},
      {"METALLOID_CACHE", Path.join(System.tmp_dir!(), "metalloid-none")}
    ]

    # The test's VM finds the application by the folder's name.
    {output, 0} = System.cmd("elixir", ["-pa", Path.join([root, "metalloid", "ebin"]), "-e", program], env: environment)

    assert output =~ "METALLOID_CXX=/nowhere/clang"
  end

  test "bad arguments are refused before anything is compiled" do
    good = [input_names: ["x0"], output_names: ["y"], source: "does not compile"]

    for {name, change} <- [
          {"no identifier", []},
          {"a b", []},
          {"", []},
          {"k\0", []},
          {nil, []},
          {1, []},
          {~c"k", []},
          {"k", input_names: "x0"},
          {"k", input_names: ["x 0"]},
          {"k", input_names: ["y"]},
          {"k", input_names: [1]},
          {"k", input_names: ["x0" | "y"]},
          {"k", output_names: []},
          {"k", output_names: nil},
          {"k", output_names: ["float"]},
          {"k", source: nil},
          {"k", source: 1},
          {"k", source: "a\0b"},
          {"k", header: :none},
          {"k", header: "\0"},
          {"k", atomic_outputs: 1},
          {"k", ensure_row_contiguous: "yes"},
          {"k", compile_options: [math_mode: :loose]},
          {"k", compile_options: [level: 3]},
          {"k", compile_options: :fast},
          {"k", debug_options: [max_iterations: -1]},
          {"k", debug_options: [max_iterations: 1.5]},
          {"k", debug_options: [verbose: true]},
          {"k", stream: 1},
          {"k", [:source]}
        ] do
      error = assert_raise ArgumentError, fn -> Kernel.metal(name, merge(good, change)) end
      assert error.message =~ ~r/^metal_kernel: /
    end

    kernel = Kernel.metal("k", good)
    {type, _, binary} = x = tensor([1.0, 2.0])
    good = [inputs: [x], output_shapes: [{2}], output_dtypes: [:f32], grid: {2, 1, 1}, threadgroup: {2, 1, 1}]

    for change <- [
          [inputs: []],
          [inputs: [x, x]],
          [inputs: x |> Tuple.to_list()],
          [inputs: nil],
          [inputs: [x | x]],
          [template: [{"n", 1} | 2]],
          [inputs: [{type, {3}, binary}]],
          [inputs: [{type, {-2}, binary}]],
          [inputs: [{type, {Bitwise.bsl(1, 62), 8}, binary}]],
          [inputs: [{{:f, 8}, {8}, binary}]],
          [inputs: [{{:c, 128}, {1}, binary}]],
          [inputs: [{type, {2}}]],
          [output_shapes: []],
          [output_shapes: [{2}, {2}]],
          [output_shapes: [{-1}]],
          [output_shapes: [{1.0}]],
          [output_shapes: [2]],
          [output_dtypes: []],
          [output_dtypes: [:float]],
          [output_dtypes: [{:f, 8}]],
          [output_dtypes: :f32],
          [output_dtypes: 3],
          [grid: {0, 1, 1}],
          [grid: {1, -1, 1}],
          [grid: {1, 1}],
          [grid: 4],
          [grid: [1, 1, 1]],
          [grid: {1.0, 1, 1}],
          [grid: {Bitwise.bsl(1, 70), 1, 1}],
          [grid: {Bitwise.bsl(1, 62), Bitwise.bsl(1, 62), 1}],
          [threadgroup: {0, 1, 1}],
          [grid: {2048, 1, 1}, threadgroup: {1025, 1, 1}],
          [threadgroup: nil],
          [template: [{"2T", 1}]],
          [template: [T: :float]],
          [template: [n: 1.5]],
          [template: [n: Bitwise.bsl(1, 40)]],
          [template: [n: Bitwise.bsl(1, 70)]],
          [template: [n: "3"]],
          [template: [:n]],
          [template: %{n: 1}],
          [template: [{1, 1}]],
          [init_value: "0"],
          [init_value: :inf],
          [dtype: :f32]
        ] do
      error = assert_raise ArgumentError, fn -> Kernel.call(kernel, merge(good, change)) end
      assert error.message =~ ~r/^metal_kernel: /, "#{inspect(change)}: #{error.message}"
    end

    # The same without the layer above.
    arguments = [kernel.reference, [x], [type], [{2}], {2, 1, 1}, {2, 1, 1}, []]

    for {position, bads} <- [
          {0, [nil, make_ref(), 1, self(), kernel]},
          {1, [nil, x, [x | x], [:x], [nil], ["x"], [[]], [Bitwise.bsl(1, 70)], List.duplicate(x, 65), [], [x, x]]},
          {2, [nil, [], [nil], [:f32], [type, type], [type | type], List.duplicate(type, 65)]},
          {3, [nil, [], [nil], [{-1}], [{2}, {2}], [Tuple.duplicate(1, 65)], [{2} | {2}]]},
          {4, [nil, {}, {1, 1}, {1, 1, 1, 1}, {0, 1, 1}, {:a, 1, 1}]},
          {5, [nil, {}, {1, 1}, {1, 1, 1, 1}, {0, 1, 1}, {:a, 1, 1}]},
          {6, [nil, [:template], [template: 1], [template: [{"T", {:f, 8}}]], [template: [{"T"}]], [init_value: "1"]]},
          {6, [[template: [{:T, 1}]], [template: [{"n", 1} | 2]], [translated: 1], [verbose: true]]},
          {6, [[template: List.duplicate({"n", 1}, 65)], [init_value: []]]}
        ],
        bad <- bads,
        function <- [:kernel_launch, :kernel_source] do
      error = assert_raise ArgumentError, fn -> apply(NIF, function, List.replace_at(arguments, position, bad)) end
      assert error.message =~ ~r/^metal_kernel: /
    end

    assert_raise RuntimeError, ~r/no memory/, fn ->
      apply(NIF, :kernel_launch, List.replace_at(arguments, 3, [{Bitwise.bsl(1, 60)}]))
    end
  end

  defp merge(_, [key]) when is_atom(key), do: [key]
  defp merge(good, change), do: Keyword.merge(good, change)

  test "a kernel that was freed is refused" do
    external =
      Task.await(
        Task.async(fn ->
          kernel = NIF.kernel_create("gone", [], ["y"], "y[0] = 1;")
          :erlang.term_to_binary(kernel)
        end)
      )

    # The process that held it may still be about to end.
    Process.sleep(50)
    :erlang.garbage_collect()

    assert_raise ArgumentError, ~r/^metal_kernel: the kernel/, fn ->
      NIF.kernel_launch(:erlang.binary_to_term(external), [], [{:f, 32}], [{1}], {1, 1, 1}, {1, 1, 1})
    end
  end

  test "100 processes at once, of one kernel and of their own, the first calls among them" do
    kernel = Kernel.metal("at_once", input_names: ["x"], output_names: ["y"], source: "y[0] = x + 77;")
    call = [output_shapes: [{1}], output_dtypes: [:s32], grid: {1, 1, 1}, threadgroup: {1, 1, 1}]
    on_binaries = fn kernel, i -> Kernel.call(kernel, [inputs: [{{:s, 32}, {}, <<i::native-32>>}]] ++ call) end

    1..100
    |> Enum.map(fn i ->
      Task.async(fn ->
        for n <- 1..20 do
          {y} = on_binaries.(kernel, i + n)
          assert values(y) == [i + n + 77]
          assert_raise ArgumentError, fn -> Kernel.call(kernel, [inputs: []] ++ call) end
        end

        source = "y[0] = x + #{rem(i, 4)};"
        own = Kernel.metal("own", input_names: ["x"], output_names: ["y"], source: source)
        {y} = on_binaries.(own, i)
        assert values(y) == [i + rem(i, 4)]
      end)
    end)
    |> Task.await_many(120_000)
  end
end

if Code.ensure_loaded?(Nx) do
  defmodule Metalloid.KernelOnNxTest do
    use ExUnit.Case, async: true

    import Nx.Defn

    alias Metalloid.Kernel

    @twice "uint i = thread_position_in_grid.x; y[i] = 2 * x0[i];"
    @exp "uint i = thread_position_in_grid.x; y[i] = T(metal::exp(x[i]) * factor);"

    deftransform scaled_exp(x, factor) do
      kernel = Kernel.metal("scaled_exp", input_names: [:x, :factor], output_names: [:y], source: @exp)
      {y} = Kernel.call(kernel, call(x, factor))
      y
    end

    defp call(x, factor) do
      [
        inputs: [x, factor],
        template: [T: Nx.type(x)],
        output_shapes: [Nx.shape(x)],
        output_dtypes: [Nx.type(x)],
        grid: {Nx.size(x), 1, 1},
        threadgroup: {256, 1, 1}
      ]
    end

    defn(in_defn(x), do: Nx.sum(scaled_exp(Nx.multiply(x, 0.5), 2.0)))

    defn with_option(x, opts \\ []) do
      {y} =
        Metalloid.Kernel.call(opts[:kernel],
          inputs: {x},
          output_shapes: {Nx.shape(x)},
          output_dtypes: {Nx.type(x)},
          grid: {3, 1, 1},
          threadgroup: {3, 1, 1}
        )

      y + 1
    end

    for type <- [f: 32, f: 16, bf: 16] do
      test "eagerly, #{inspect(type)}" do
        x = Nx.tensor([[0.0, 1.0, -1.0], [0.5, 2.0, -3.0]], type: unquote(type))
        y = scaled_exp(x, 2.0)
        assert Nx.type(y) == unquote(type)
        assert Nx.to_number(Nx.all_close(y, Nx.multiply(Nx.exp(x), 2), rtol: 1.0e-2)) == 1
        assert %Nx.BinaryBackend{} = y.data
      end
    end

    test "in defn, in jit, as an option" do
      x = Nx.tensor([0.0, 1.0, -1.0])
      expected = x |> Nx.multiply(0.5) |> Nx.exp() |> Nx.multiply(2) |> Nx.sum() |> Nx.to_number()
      assert_in_delta Nx.to_number(in_defn(x)), expected, 1.0e-5
      assert_in_delta Nx.to_number(Nx.Defn.jit(&in_defn/1).(x)), expected, 1.0e-5
      # A factor that is a tensor of rank 0 is the same to the kernel.
      assert Nx.Defn.jit(&scaled_exp/2).(x, 2.0) == scaled_exp(x, 2.0)
      kernel = Kernel.metal("twice", input_names: ["x0"], output_names: ["y"], source: @twice)
      assert with_option(x, kernel: kernel) == Nx.tensor([1.0, 3.0, -1.0])
    end

    test "a gradient by custom_grad" do
      gradient = fn x ->
        y = scaled_exp(x, 2.0)
        Nx.sum(Nx.Defn.Kernel.custom_grad(y, [x], fn g -> [Nx.multiply(g, y)] end))
      end

      x = Nx.tensor([0.0, 1.0])
      assert Nx.to_number(Nx.all_close(Nx.Defn.grad(x, gradient), scaled_exp(x, 2.0))) == 1
    end

    test "without tensors, and what does not fit" do
      kernel = Kernel.metal("constant", input_names: ["x"], output_names: ["y"], source: "y[0] = x;")
      good = [inputs: [3], output_shapes: [{1}], output_dtypes: [:bool], grid: {1, 1, 1}, threadgroup: {1, 1, 1}]
      assert Kernel.call(kernel, good) == {Nx.tensor([1], type: :u8)}
      vectorized = Nx.vectorize(Nx.tensor([1.0]), :x)

      for change <- [[inputs: [vectorized]], [output_dtypes: [:float]], [output_shapes: [3]], [inputs: ["x"]]] do
        assert_raise ArgumentError, fn -> Kernel.call(kernel, Keyword.merge(good, change)) end
      end
    end

    test "results go to the backend of the first tensor" do
      x = Nx.backend_copy(Nx.tensor([1.0, 2.0]), {Metalloid.OtherBackend, []})
      kernel = Kernel.metal("twice", input_names: ["x0"], output_names: ["y"], source: @twice)
      {y} = Kernel.call(kernel, Keyword.put(Keyword.delete(call(x, nil), :template), :inputs, [x]))
      assert %Metalloid.OtherBackend{} = y.data
      assert Nx.to_flat_list(Nx.backend_copy(y, Nx.BinaryBackend)) == [2.0, 4.0]
    end
  end
end
