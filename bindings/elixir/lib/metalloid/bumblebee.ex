if Code.ensure_loaded?(Axon) do
  defmodule Metalloid.Bumblebee do
    @moduledoc """
    Puts `Metalloid.Fast` into the graph of a Bumblebee model.

        {:ok, model_info} = Bumblebee.load_model({:hf, "Qwen/Qwen3-0.6B"})
        {model_info, report} = Metalloid.Bumblebee.rewrite(model_info)
        report.replaced
        #=> %{rms_norm: 113, rotary_embedding: 28, attention: 28, gated_ffn: 28}

    What is replaced, in any model whose graph has these nodes (Llama, Qwen3, Gemma, Mistral, Phi-3, SmolLM3 among
    them):

      * `:rms_norm` - `Bumblebee.Layers.rms_norm/2`, with any shift and either upcast, by `Metalloid.Fast.rms_norm/3`
      * `:layer_norm` - `Axon.layer_norm/2` over the last axis, by `Metalloid.Fast.layer_norm/4`
      * `:rotary_embedding` - `Bumblebee.Layers.rotary_embedding/6`, with any scaling strategy, by
        `Metalloid.Fast.rope_with_positions/6` or `Metalloid.Fast.rope_with_freqs/6`
      * `:attention` - `Bumblebee.Layers.attention/8`: causal, windowed, with an offset into a cache, key mask and bias,
        by `Metalloid.Fast.scaled_dot_product_attention/5` on `{B, T, N, D}`, so that nothing is transposed
      * `:gated_ffn` - `up * silu(gate)` and `up * gelu(gate)` with either GELU, by `Metalloid.Fast.swiglu/2` and
        `Metalloid.Fast.geglu/3`

    Nodes keep their names, parameters, policies and hooks, so parameters load and train as before, and everything else
    of the graph stays as it was. Where a node is asked for what the fused operation does not do, its original runs:
    attention with a head mask, with dropout while training, or with a bias beside a mask of rank 4; a gate that is
    broadcast. That is decided when the graph is compiled, since the graph alone does not tell it.

    ## Differences in values

    Results differ by rounding: norms, rotation and attention are rounded once, and angles are formed in float64. A
    query that sees no key, which is padding, has zeros where Bumblebee has the mean of the values.

    Attention weights are an output of Bumblebee's models; where they are asked for, they are computed as before, beside
    the fused attention.
    """

    alias Metalloid.Fast

    @typedoc "How many nodes of each kind were replaced, and which nodes of these kinds were not, with the reason."
    @type report :: %{replaced: %{atom() => pos_integer()}, kept: [{atom(), String.t()}]}

    @doc """
    Replaces what can be replaced in a model, or in the map that `Bumblebee.load_model/2` gives, and says what that was.

        iex> x = Axon.input("x", shape: {nil, 4})
        iex> {model, report} = Metalloid.Bumblebee.rewrite(Axon.layer_norm(x))
        iex> report
        %{replaced: %{layer_norm: 1}, kept: []}
        iex> {_init, predict} = Axon.build(model)
        iex> params = %{"layer_norm_0" => %{"gamma" => Nx.broadcast(1.0, {4}), "beta" => Nx.broadcast(0.0, {4})}}
        iex> y = predict.(Axon.ModelState.new(params), Nx.tensor([[1.0, 1, 3, 3]]))
        iex> Nx.to_flat_list(Nx.round(y))
        [-1.0, -1.0, 1.0, 1.0]
    """
    @spec rewrite(model) :: {model, report()} when model: Axon.t() | %{:model => Axon.t(), optional(atom()) => term()}
    def rewrite(%Axon{nodes: nodes} = model) do
      {nodes, report} =
        Enum.reduce(reachable(model), {nodes, %{replaced: %{}, kept: []}}, fn id, {new, report} ->
          node = Map.fetch!(nodes, id)

          case replace(node, nodes) do
            {:replace, kind, node} -> {Map.put(new, id, node), count(report, kind)}
            {:keep, kind, reason} -> {new, update_in(report.kept, &[{kind, reason} | &1])}
            :other -> {new, report}
          end
        end)

      {%{model | nodes: nodes}, %{report | kept: Enum.sort(report.kept)}}
    end

    def rewrite(%{model: %Axon{} = model} = model_info) do
      {model, report} = rewrite(model)
      {%{model_info | model: model}, report}
    end

    defp count(report, kind), do: update_in(report.replaced, &Map.update(&1, kind, 1, fn count -> count + 1 end))

    defp reachable(model), do: Axon.reduce_nodes(model, [], fn node, ids -> [node.id | ids] end)

    # ---- nodes -----------------------------------------------------------------------------------

    # A node keeps all but its function, and has more parents where the function wants to see them.
    defp replace(%{op_name: :rms_norm, op: op} = node, _) do
      case name(op) do
        {Bumblebee.Layers, :rms_norm_impl_upcast_normalization, 3} ->
          {:replace, :rms_norm, %{node | op: &__MODULE__.rms_norm/3}}

        {Bumblebee.Layers, :rms_norm_impl_upcast_all, 3} ->
          {:replace, :rms_norm, %{node | op: &__MODULE__.rms_norm_in_f32/3}}

        _ ->
          {:keep, :rms_norm, "its function is not Bumblebee's"}
      end
    end

    defp replace(%{op: :layer_norm, opts: opts} = node, _) do
      if Keyword.get(opts, :channel_index, -1) == -1,
        do: {:replace, :layer_norm, %{node | op: &__MODULE__.layer_norm/4}},
        else: {:keep, :layer_norm, "its channel_index is not -1"}
    end

    defp replace(%{op: :multiply, parent: [container]} = node, nodes) do
      with %{op_name: :container, parent: [a, b]} <- nodes[container],
           {activation, gate, up} <- gate_and_up(nodes, a, b) || gate_and_up(nodes, b, a) do
        opts = Keyword.put(node.opts, :activation, activation)

        {:replace, :gated_ffn,
         %{node | op: &__MODULE__.gated/3, opts: opts, parent: [gate, up], args: [:layer, :layer]}}
      else
        _ -> :other
      end
    end

    defp replace(%{op: op} = node, nodes) when is_function(op) do
      case name(op) do
        {Bumblebee.Layers, :apply_rotary_embedding, 5} ->
          {:replace, :rotary_embedding, %{node | op: &__MODULE__.rotary_embedding/5}}

        {Bumblebee.Layers, :attention_output_impl, 3} ->
          replace_attention(node, nodes)

        _ ->
          :other
      end
    end

    defp replace(_, _), do: :other

    # The scores' node, behind dropout, has what the fused attention reads. The weights stay a parent for the original
    # function.
    defp replace_attention(%{parent: [weights, value]} = node, nodes) do
      with %{op: :dropout, parent: [scores | _]} <- nodes[weights],
           %{parent: [_query, _key, _key_mask, _head_mask, _bias, _offset] = parents, opts: opts} = scores <-
             nodes[scores],
           {Bumblebee.Layers, :attention_weights_impl, 7} <- name(scores.op) do
        {:replace, :attention,
         %{
           node
           | op: &__MODULE__.attention/9,
             parent: [weights, value | parents],
             args: List.duplicate(:layer, 8),
             opts: Keyword.merge(node.opts, opts) ++ [original: node.op]
         }}
      else
        _ -> {:keep, :attention, "its weights are not those of Bumblebee.Layers.attention/8"}
      end
    end

    defp gate_and_up(nodes, activated, up) do
      with %{parent: [gate]} = node <- nodes[activated], activation when activation != nil <- activation(node) do
        {activation, gate, up}
      else
        _ -> nil
      end
    end

    # Bumblebee 0.7's Gemma asks Axon for gelu_approx_tanh, which Axon does not have.
    defp activation(%{op: op}) when op in [:silu, :gelu, :gelu_approx_tanh], do: op

    # Bumblebee captures its own by name, in a function of Bumblebee.Layers.activation/3.
    defp activation(%{op: op}) when is_function(op, 2) do
      case Function.info(op, :module) do
        {:module, Bumblebee.Layers} -> if Function.info(op, :env) == {:env, [:gelu_approx_tanh]}, do: :gelu_approx_tanh
        _ -> nil
      end
    end

    defp activation(_), do: nil

    defp name(op) when is_function(op) do
      {:module, module} = Function.info(op, :module)
      {:name, name} = Function.info(op, :name)
      {:arity, arity} = Function.info(op, :arity)
      {module, name, arity}
    end

    defp name(_), do: nil

    # ---- what runs in their place ----------------------------------------------------------------

    @doc false
    def rms_norm(x, weight, opts) do
      x = Nx.as_type(x, Nx.Type.merge(Nx.type(x), Nx.type(weight)))
      Fast.rms_norm(x, shifted(weight, opts[:shift] || 0.0), opts[:epsilon])
    end

    @doc false
    def rms_norm_in_f32(x, weight, opts), do: rms_norm(Nx.as_type(x, :f32), weight, opts)

    defp shifted(weight, shift) when shift == 0, do: weight
    defp shifted(weight, shift), do: weight |> Nx.as_type(:f32) |> Nx.add(shift)

    @doc false
    def layer_norm(x, gamma, beta, opts) do
      type = Nx.type(x) |> Nx.Type.merge(Nx.type(gamma)) |> Nx.Type.merge(Nx.type(beta))
      Fast.layer_norm(Nx.as_type(x, type), gamma, beta, opts[:epsilon])
    end

    @doc false
    def gated(gate, up, opts) do
      fused? = Nx.shape(gate) == Nx.shape(up) and Nx.type(gate) == Nx.type(up)

      case opts[:activation] do
        :silu when fused? -> Fast.swiglu(gate, up)
        :gelu when fused? -> Fast.geglu(gate, up)
        :gelu_approx_tanh when fused? -> Fast.geglu(gate, up, approximate: :tanh)
        :gelu_approx_tanh -> Nx.multiply(up, apply(Bumblebee.Layers, :gelu_approx_tanh, [gate, []]))
        activation -> Nx.multiply(up, apply(Axon.Activations, activation, [gate]))
      end
    end

    @doc false
    def rotary_embedding(query, key, position_ids, attention_mask, opts) do
      # Strategies look at the whole length, which under a cache only the mask knows.
      length = Nx.axis_size(if(is_struct(attention_mask, Axon.None), do: position_ids, else: attention_mask), 1)
      size = opts[:size]
      base = Keyword.get(opts, :base, 10_000)
      max_positions = Keyword.get(opts, :max_positions, 2048)
      {how, magnitude} = strategy(opts[:scaling_strategy], size, base, max_positions, length)

      rotate = fn x ->
        rotated =
          case how do
            {:base, base, scale} ->
              Fast.rope_with_positions(x, position_ids, size, false, base, scale)

            {:inv_freqs, inv_freqs} ->
              inv_freqs = Nx.tensor(inv_freqs, type: :f64, backend: Nx.BinaryBackend)
              Fast.rope_with_freqs(x, position_ids, size, false, 1.0, inv_freqs)
          end

        if magnitude == 1.0, do: rotated, else: rotated |> Nx.multiply(magnitude) |> Nx.as_type(Nx.type(x))
      end

      {rotate.(query), rotate.(key)}
    end

    # Bumblebee's strategies, in numbers: what turns the pairs, and a factor of the result.
    defp strategy(%{type: :linear, factor: factor}, _size, base, _max_positions, _length),
      do: {{:base, base, 1 / factor}, 1.0}

    # NTK-aware scaling.
    defp strategy(%{type: :dynamic, factor: factor}, size, base, max_positions, length) when length > max_positions do
      {{:base, :math.pow(base * (factor * length / max_positions - (factor - 1)), size / (size - 2)), 1.0}, 1.0}
    end

    # Ding et al. 2024, arXiv:2402.13753
    defp strategy(%{type: :longrope} = strategy, size, base, max_positions, length) do
      original = strategy.original_max_positions
      factors = if length > original, do: strategy.long_factor, else: strategy.short_factor
      stretch = max_positions / original
      magnitude = if stretch <= 1, do: 1.0, else: :math.sqrt(1 + :math.log(stretch) / :math.log(original))
      {{:inv_freqs, Enum.zip_with(inverse_frequencies(size, base), factors, &(&1 / &2))}, magnitude}
    end

    # Long waves are slowed by `factor`, short ones left, those between interpolated.
    defp strategy(%{type: :llama3, factor: factor} = strategy, size, base, _max_positions, _length) do
      original = strategy.original_max_positions
      {low, high} = {strategy.low_frequency_factor, strategy.high_frequency_factor}

      inv_freqs =
        for inv_freq <- inverse_frequencies(size, base) do
          wavelength = 2 * :math.pi() / inv_freq
          share = (original / wavelength - low) / (high - low)

          cond do
            wavelength < original / high -> inv_freq
            wavelength > original / low -> inv_freq / factor
            true -> (1 - share) * inv_freq / factor + share * inv_freq
          end
        end

      {{:inv_freqs, inv_freqs}, 1.0}
    end

    defp strategy(_, _size, base, _max_positions, _length), do: {{:base, base, 1.0}, 1.0}

    defp inverse_frequencies(size, base), do: for(i <- 0..(div(size, 2) - 1), do: :math.pow(base, -2 * i / size))

    @doc false
    def attention(weights, value, query, key, key_mask, head_mask, bias, offset, opts) do
      [key_mask, head_mask, bias, offset] = Enum.map([key_mask, head_mask, bias, offset], &present/1)
      dropout? = opts[:mode] == :train and (opts[:dropout_rate] || 0.0) > 0
      full_mask? = key_mask != nil and Nx.rank(key_mask) == 4

      if head_mask || dropout? || (full_mask? && bias) do
        opts[:original].(weights, value, Keyword.take(opts, [:mode]))
      else
        scale = opts[:scale] || 1 / :math.sqrt(Nx.axis_size(query, -1))
        lengths = {Nx.axis_size(query, 1), Nx.axis_size(key, 1)}

        options =
          [time_axis: 1, key_mask: unless(full_mask?, do: key_mask)] ++
            seen(opts[:causal], opts[:window_size], offset || 0, lengths)

        mask = if full_mask?, do: key_mask, else: bias && Nx.as_type(bias, Nx.type(query))
        Fast.scaled_dot_product_attention(query, key, value, scale, with_mask(options, mask))
      end
    end

    defp present(%Axon.None{}), do: nil
    defp present(tensor), do: tensor

    # Query i stands at i + offset. A window counts keys to the left of it.
    defp seen(causal, nil, offset, _), do: if(causal, do: [causal: true, causal_offset: offset], else: [])

    defp seen(true, {left, _right}, offset, _), do: [causal: true, causal_offset: offset, window: left + 1]

    defp seen(_, {left, right}, offset, {query_length, key_length}) do
      position = Nx.add(Nx.iota({query_length, 1}, backend: Nx.BinaryBackend), offset)
      distance = Nx.subtract(position, Nx.iota({1, key_length}, backend: Nx.BinaryBackend))
      [mask: Nx.logical_and(Nx.less_equal(distance, left), Nx.greater_equal(distance, -right))]
    end

    # A window's mask beside another: integers hide, a bias is added.
    defp with_mask(options, nil), do: options

    defp with_mask(options, mask) do
      Keyword.update(options, :mask, mask, fn window ->
        if Nx.Type.integer?(Nx.type(mask)) do
          Nx.logical_and(window, mask)
        else
          hidden = Nx.Constants.neg_infinity(Nx.type(mask), backend: Nx.BinaryBackend)
          shape = mask |> Nx.shape() |> put_elem(2, Nx.axis_size(window, 0)) |> put_elem(3, Nx.axis_size(window, 1))
          Nx.select(Nx.broadcast(window, shape), mask, hidden)
        end
      end)
    end
  end
end
