defmodule Metalloid.Kernel do
  @moduledoc """
  Kernels of your own, written in the Metal Shading Language as for MLX's `mx.fast.metal_kernel`, on machines without
  Metal.

      iex> kernel =
      ...>   Metalloid.Kernel.metal("double",
      ...>     input_names: ["x"],
      ...>     output_names: ["y"],
      ...>     source: "uint i = thread_position_in_grid.x; y[i] = 2 * x[i];"
      ...>   )
      iex> x = {{:f, 32}, {2}, <<1.0::float-native-32, 2.5::float-native-32>>}
      iex> {{{:f, 32}, {2}, y}} =
      ...>   Metalloid.Kernel.call(kernel,
      ...>     inputs: [x],
      ...>     output_shapes: [{2}],
      ...>     output_dtypes: [{:f, 32}],
      ...>     grid: {2, 1, 1},
      ...>     threadgroup: {2, 1, 1}
      ...>   )
      iex> for <<value::float-native-32 <- y>>, do: value
      [2.0, 5.0]

  It runs on the CPU. The first call with new types compiles, which needs clang: that of `PATH`, or the program that the
  environment variable `METALLOID_CXX` names. Compiled kernels are kept in `METALLOID_CACHE`, else
  `~/.cache/metalloid`. All are read from the environment that the VM was started with.

  A kernel may be used by any number of processes at once, and is freed after its last reference.

  > #### A kernel is native code {: .warning}
  >
  > It runs with the rights of the VM, and one that writes beyond its outputs may end it.
  > `debug_options: [max_iterations: n]` stops one that does not end.

  ## In defn

  `call/2` is a `deftransform` over `Nx.runtime_call/4` where Nx is. A kernel is made outside `defn` and handed in as an
  option, or made in a `deftransform`. It has no gradient of its own; `Nx.Defn.Kernel.custom_grad/3` gives it one.
  """

  import Metalloid.Tensor, only: [deftransform: 2]

  @enforce_keys [:reference, :name, :inputs, :outputs]
  defstruct @enforce_keys

  @opaque t :: %__MODULE__{reference: reference(), name: String.t(), inputs: arity(), outputs: arity()}

  @typedoc "As Nx writes it, `{:f, 32}` or `:f32`, or `:bool`; an output of `:bool` comes as `{:u, 8}`."
  @type dtype :: Metalloid.NIF.type() | atom()

  @typedoc "A finite number or what no float of the VM can be."
  @type real :: number() | :infinity | :neg_infinity | :nan

  @doc """
  Makes a kernel from the body of a function. Nothing is compiled yet.

  The signature follows from the arguments of a call: `const device T* name` for an input (a reference where it has rank
  0), `device T* name` for an output, and `name_shape`, `name_strides`, `name_ndim` and Metal's attributes
  (`thread_position_in_grid`, ...) where the source mentions them.

  ## Options

    * `:output_names` - identifiers, at least one
    * `:source` - the function's body
    * `:input_names` - identifiers; default `[]`
    * `:header` - stands before the function
    * `:atomic_outputs` - outputs are `device atomic<T>*`; default `false`
    * `:compile_options` - `[math_mode: :safe | :relaxed | :fast]`; safe, the default, keeps IEEE's special values
    * `:debug_options` - `:debug` keeps the sources beside a `-g` build, `:address_sanitizer` reports accesses out of
      bounds (preload the sanitizer's run-time), `:max_iterations` stops a kernel one thread of which goes through more
      iterations of its loops
    * `:ensure_row_contiguous` - for MLX's sake: tensors of Elixir always are

  Raises `ArgumentError` for a name that is no identifier and for an option that is not known:

      iex> Metalloid.Kernel.metal("my kernel", output_names: ["y"], source: "")
      ** (ArgumentError) metal_kernel: name must be an identifier: letters, digits and _
  """
  @spec metal(String.t() | atom(), keyword()) :: t()
  def metal(name, options) do
    options =
      validate(options, [
        :output_names,
        :source,
        input_names: [],
        header: nil,
        ensure_row_contiguous: true,
        atomic_outputs: false,
        compile_options: [],
        debug_options: []
      ])

    compile = validate(options[:compile_options], math_mode: :safe)
    debug = validate(options[:debug_options], debug: false, address_sanitizer: false, max_iterations: 0)
    [inputs, outputs] = for key <- [:input_names, :output_names], do: names(key, fetch(options, key))

    reference =
      Metalloid.NIF.kernel_create(
        name(name),
        inputs,
        outputs,
        fetch(options, :source),
        Keyword.take(options, [:header, :ensure_row_contiguous, :atomic_outputs]) ++ compile ++ debug
      )

    %__MODULE__{reference: reference, name: name(name), inputs: length(inputs), outputs: length(outputs)}
  end

  @doc """
  Runs the kernel and returns the tuple of its outputs.

  ## Options

    * `:inputs` - a list (in `defn` also a tuple) of Nx tensors, or of `{type, shape, binary}` tuples; numbers and booleans
      among them arrive as `int`, `float` and `bool` of rank 0
    * `:output_shapes`, `:output_dtypes` - of each output, lists
    * `:grid` - threads in all along x, y, z
    * `:threadgroup` - threads of a threadgroup along x, y, z, at most 1024 in all; it is cut to the grid, and smaller at
      the edges where the grid is no multiple
    * `:template` - `[T: {:f, 32}, n: 4, flag: true]`, arguments of the kernel's template in their order
    * `:init_value` - what the outputs hold before the kernel runs, also `:infinity`, `:neg_infinity`, `:nan`; without
      it, anything
    * `:verbose` - prints the generated source when the kernel runs; default `false`

  Outputs are Nx tensors, on the backend of the first input tensor, unless an input is a tuple or Nx is not there; then
  they are tuples too.

  Raises `ArgumentError` for arguments that do not fit, before anything is compiled. Raises `RuntimeError` where there is
  no compiler, where the source does not compile, with the compiler's words and the lines of `:source` and `:header`,
  and where the kernel was stopped: a barrier that only part of a threadgroup reaches.
  """
  @spec call(t(), keyword()) :: tuple()
  deftransform call(%__MODULE__{} = kernel, options) do
    arguments = arguments(kernel, options)
    options = [kernel: kernel, arguments: %{arguments | inputs: nil}]
    Metalloid.Tensor.call(arguments.inputs, arguments.output_dtypes, arguments.output_shapes, options, &run/2)
  end

  defp run(inputs, options), do: launch(options[:kernel], %{options[:arguments] | inputs: inputs})

  @doc """
  The generated source of such a call, without running it: Metal's, or with `translated: true` the C++ that is compiled.

  The options are those of `call/2`; `:grid` and `:threadgroup` may be left out.
  """
  @spec source(t(), keyword()) :: String.t()
  def source(%__MODULE__{} = kernel, options) do
    {translated, options} = Keyword.pop(options, :translated, false)
    arguments = arguments(kernel, Keyword.merge([grid: {1, 1, 1}, threadgroup: {1, 1, 1}], options))
    source(kernel, arguments, translated)
  end

  # ---- arguments ---------------------------------------------------------------------------------

  defp arguments(kernel, options) do
    options =
      validate(options, [
        :inputs,
        :output_shapes,
        :output_dtypes,
        :grid,
        :threadgroup,
        template: [],
        init_value: nil,
        verbose: false
      ])

    inputs = list(:inputs, fetch(options, :inputs))
    shapes = list(:output_shapes, fetch(options, :output_shapes))
    types = list(:output_dtypes, fetch(options, :output_dtypes))

    for {key, given, wanted} <- [
          {:inputs, inputs, kernel.inputs},
          {:output_shapes, shapes, kernel.outputs},
          {:output_dtypes, types, kernel.outputs}
        ],
        length(given) != wanted do
      raise ArgumentError,
            "metal_kernel: #{key} must have #{wanted} entries for #{kernel.name}, got #{length(given)}"
    end

    for shape <- shapes, not is_tuple(shape) do
      raise ArgumentError, "metal_kernel: output_shapes must be tuples, got #{inspect(shape)}"
    end

    %{
      inputs: inputs,
      output_shapes: shapes,
      output_dtypes: Enum.map(types, &type/1),
      grid: fetch(options, :grid),
      threadgroup: fetch(options, :threadgroup),
      template: template(options[:template]),
      init_value: options[:init_value],
      verbose: options[:verbose] == true
    }
  end

  defp launch(kernel, arguments) do
    if arguments.verbose do
      IO.puts("Generated source code for `#{kernel.name}`:\n```\n#{source(kernel, arguments, false)}\n```")
    end

    call(&Metalloid.NIF.kernel_launch/7, kernel, arguments, init_value: arguments.init_value)
  end

  defp source(kernel, arguments, translated) do
    call(&Metalloid.NIF.kernel_source/7, kernel, arguments, translated: translated)
  end

  defp call(function, kernel, arguments, option) do
    function.(
      kernel.reference,
      Enum.map(arguments.inputs, &Metalloid.Tensor.to_term/1),
      arguments.output_dtypes,
      arguments.output_shapes,
      arguments.grid,
      arguments.threadgroup,
      [{:template, arguments.template} | option]
    )
  end

  defp validate(options, keys) do
    unless Keyword.keyword?(options),
      do: raise(ArgumentError, "metal_kernel: options must be a keyword list, got #{inspect(options)}")

    known = Enum.map(keys, fn key -> if is_tuple(key), do: elem(key, 0), else: key end)

    for {key, _} <- options, key not in known do
      raise ArgumentError, "metal_kernel: there is no option #{inspect(key)}"
    end

    Keyword.merge(Enum.filter(keys, &is_tuple/1), options)
  end

  defp fetch(options, key) do
    case options[key] do
      nil -> raise ArgumentError, "metal_kernel: #{key} must be given"
      value -> value
    end
  end

  # In defn a list is written as a tuple.
  defp list(_key, value) when is_tuple(value), do: Tuple.to_list(value)

  defp list(key, value) do
    if is_list(value) and not List.improper?(value),
      do: value,
      else: raise(ArgumentError, "metal_kernel: #{key} must be a list, got #{inspect(value)}")
  end

  defp names(key, names), do: key |> list(names) |> Enum.map(&name/1)

  defp name(name) when is_atom(name) and not is_nil(name), do: Atom.to_string(name)
  defp name(name), do: name

  @short_types for {kind, sizes} <- [f: [16, 32, 64], bf: [16], s: [8, 16, 32, 64], u: [8, 16, 32, 64], c: [64]],
                   size <- sizes,
                   into: %{},
                   do: {:"#{kind}#{size}", {kind, size}}

  defp type(type), do: Map.get(@short_types, type, type)

  defp template(pairs) do
    for pair <- list(:template, pairs) do
      case pair do
        {name, value} -> {name(name), type(value)}
        _ -> raise ArgumentError, "metal_kernel: template must have {name, value} entries, got #{inspect(pair)}"
      end
    end
  end
end
