if Code.ensure_loaded?(Nx) do
  defmodule Metalloid.Tensor do
    @moduledoc false
    # Between Nx's tensors and the terms of Metalloid.NIF.

    defmacro deftransform(head, body) do
      quote do
        require Nx.Defn
        Nx.Defn.deftransform(unquote(head), unquote(body))
      end
    end

    def to_term(%Nx.Tensor{} = tensor), do: {tensor.type, tensor.shape, Nx.to_binary(tensor)}
    def to_term(other), do: other

    # A result goes where the first tensor is, with the options that the default backend has if it is the same one.
    def from_term({type, shape, binary}, %Nx.Tensor{type: type, shape: shape} = template, first) do
      {default, options} = Nx.default_backend()
      backend = if first, do: first.data.__struct__, else: default
      backend.from_binary(template, binary, if(backend == default, do: options, else: []))
    end

    # Calls `fun` with the inputs, tensors that have values among them, and the options; a tuple of terms becomes one of
    # tensors, unless there is a term among the inputs.
    def call(inputs, types, shapes, options, fun) do
      for %Nx.Tensor{vectorized_axes: [_ | _]} <- inputs do
        raise ArgumentError, "metal_kernel: an input is vectorized, which is not supported; see Nx.devectorize/2"
      end

      if Enum.any?(inputs, &is_tuple/1) do
        fun.(inputs, options)
      else
        templates = Enum.zip_with(shapes, types, &Nx.template(&1, if(&2 == :bool, do: {:u, 8}, else: &2)))
        tensors = for %Nx.Tensor{} = tensor <- inputs, do: tensor
        numbers = Enum.map(inputs, &if(match?(%Nx.Tensor{}, &1), do: :tensor, else: &1))
        options = options ++ [inputs: numbers, templates: templates, fun: fun]

        # Nx calls nothing without operands; what such a kernel gives is a constant.
        if tensors == [],
          do: run({}, options),
          else: Nx.runtime_call(List.to_tuple(templates), List.to_tuple(tensors), options, &__MODULE__.run/2)
      end
    end

    def run(tensors, options) do
      tensors = Tuple.to_list(tensors)

      {inputs, []} =
        Enum.map_reduce(options[:inputs], tensors, fn
          :tensor, [tensor | rest] -> {tensor, rest}
          number, rest -> {number, rest}
        end)

      inputs
      |> options[:fun].(options)
      |> Tuple.to_list()
      |> Enum.zip_with(options[:templates], &from_term(&1, &2, List.first(tensors)))
      |> List.to_tuple()
    end
  end
else
  defmodule Metalloid.Tensor do
    @moduledoc false
    # The same without Nx: there are terms alone.

    defmacro deftransform(head, do: body), do: quote(do: def(unquote(head), do: unquote(body)))

    def to_term(term), do: term

    def call(inputs, _types, _shapes, options, fun), do: fun.(inputs, options)
  end
end
