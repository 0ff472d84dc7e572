if Code.ensure_loaded?(Axon) do
  defmodule Metalloid.BumblebeeTest do
    use ExUnit.Case, async: true

    doctest Metalloid.Bumblebee

    test "a layer norm over another axis stays, and is reported" do
      x = Axon.input("x", shape: {nil, 3, 4})
      {_, report} = Metalloid.Bumblebee.rewrite(Axon.layer_norm(x, channel_index: 1))
      assert report == %{replaced: %{}, kept: [layer_norm: "its channel_index is not -1"]}
    end

    test "a gate that is broadcast is not fused" do
      gate = Axon.input("gate", shape: {nil, 1})
      up = Axon.input("up", shape: {nil, 4})

      for activation <- [:silu, :gelu] do
        model = Axon.multiply(up, Axon.activation(gate, activation))
        {new, %{replaced: %{gated_ffn: 1}}} = Metalloid.Bumblebee.rewrite(model)
        inputs = %{"gate" => Nx.tensor([[1.0], [2.0]]), "up" => Nx.iota({2, 4}, type: :f32)}
        state = Axon.ModelState.empty()
        assert Axon.predict(new, state, inputs) == Axon.predict(model, state, inputs)
      end
    end

    test "parameters are those that they were, and train" do
      model = Axon.input("x", shape: {nil, 4}) |> Axon.layer_norm(name: "norm") |> Axon.dense(2, name: "out")
      {new, _} = Metalloid.Bumblebee.rewrite(model)
      {init, predict} = Axon.build(model)
      {new_init, new_predict} = Axon.build(new)
      x = Nx.tensor([[1.0, 2.0, -1.0, 0.5]])
      params = init.(x, Axon.ModelState.empty())
      assert Map.keys(new_init.(x, Axon.ModelState.empty()).data) == Map.keys(params.data)

      grad = fn predict ->
        Nx.Defn.grad(params.data, fn data -> Nx.sum(Nx.pow(predict.(%{params | data: data}, x), 2)) end)
      end

      for {layer, tensors} <- grad.(predict), {name, expected} <- tensors do
        assert Nx.to_number(Nx.all_close(grad.(new_predict)[layer][name], expected, atol: 1.0e-5)) == 1
      end
    end

    if Code.ensure_loaded?(Bumblebee) do
      alias Bumblebee.Text

      @small [vocab_size: 64, hidden_size: 32, intermediate_size: 48, num_blocks: 2, num_attention_heads: 4]
      @grouped [num_key_value_heads: 2]
      @of_decoder %{attention: 2, gated_ffn: 2, rms_norm: 5, rotary_embedding: 2}

      defp spec(module, architecture \\ :for_causal_language_modeling, opts),
        do: Bumblebee.configure(module, [architecture: architecture] ++ Keyword.merge(@small, opts))

      defp inputs do
        %{
          "input_ids" => Nx.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]]),
          "attention_mask" => Nx.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
        }
      end

      # Logits of tokens that are not padding; what a padded token gets is nobody's business.
      defp compare(spec, expected_report, inputs \\ inputs(), bound \\ 2.0e-6) do
        model = Bumblebee.build_model(spec)
        {new, report} = Metalloid.Bumblebee.rewrite(model)
        assert report.replaced == expected_report
        {init, predict} = Axon.build(model)
        {_, new_predict} = Axon.build(new)
        params = init.(inputs, Axon.ModelState.empty())
        close(new_predict.(params, inputs).logits, predict.(params, inputs).logits, inputs["attention_mask"], bound)
      end

      defp close(got, expected, mask, bound) do
        shown = mask |> Nx.new_axis(-1) |> Nx.broadcast(Nx.shape(expected))
        [got, expected] = Enum.map([got, expected], &Nx.select(shown, Nx.as_type(&1, :f64), 0))
        error = got |> Nx.subtract(expected) |> Nx.abs() |> Nx.reduce_max() |> Nx.to_number()
        assert error <= bound * max(1.0, expected |> Nx.abs() |> Nx.reduce_max() |> Nx.to_number())
      end

      test "Llama, with every scaling strategy" do
        strategies = [
          nil,
          %{type: :linear, factor: 4.0},
          %{type: :dynamic, factor: 2.0},
          %{
            type: :llama3,
            factor: 8.0,
            low_frequency_factor: 1.0,
            high_frequency_factor: 4.0,
            original_max_positions: 16
          }
        ]

        for strategy <- strategies do
          # Fewer positions than tokens, so that the dynamic strategy has something to do.
          spec = spec(Text.Llama, @grouped ++ [max_positions: 4, rotary_embedding_scaling_strategy: strategy])
          compare(spec, @of_decoder)
        end
      end

      test "Qwen3, whose queries and keys are normalized" do
        compare(spec(Text.Qwen3, @grouped ++ [attention_head_size: 16]), %{@of_decoder | rms_norm: 9})
      end

      test "Gemma, whose norms are shifted" do
        compare(spec(Text.Gemma, @grouped ++ [attention_head_size: 8, activation: :gelu]), @of_decoder)
      end

      test "Gemma's own activation, which Bumblebee 0.7 cannot compile" do
        model = Bumblebee.build_model(spec(Text.Gemma, @grouped ++ [attention_head_size: 8]))
        {new, %{replaced: @of_decoder}} = Metalloid.Bumblebee.rewrite(model)
        {init, predict} = Axon.build(new)
        logits = predict.(init.(inputs(), Axon.ModelState.empty()), inputs()).logits
        assert logits |> Nx.is_nan() |> Nx.any() |> Nx.to_number() == 0
      end

      test "Gemma 3, with windows" do
        compare(spec(Text.Gemma3Text, attention_window_size: 2), %{@of_decoder | rms_norm: 13})
      end

      test "Mistral, with a window" do
        compare(spec(Text.Mistral, @grouped ++ [attention_window_size: 2]), @of_decoder)
      end

      test "Phi-3, with long factors" do
        strategy = %{
          type: :longrope,
          short_factor: [1.0, 1.1, 1.2, 1.3],
          long_factor: [1.0, 2.0, 3.0, 4.0],
          original_max_positions: 4
        }

        opts = [activation: :silu, max_positions: 64, rotary_embedding_scaling_strategy: strategy]
        compare(spec(Text.Phi3, opts), @of_decoder)
      end

      test "BERT: layer norms, attention in both directions" do
        compare(spec(Text.Bert, :for_masked_language_modeling, []), %{attention: 2, layer_norm: 6})
      end

      test "ModernBERT: windows in both directions" do
        spec = spec(Text.ModernBert, :for_masked_language_modeling, local_attention_window: 2)
        {_, report} = spec |> Bumblebee.build_model() |> Metalloid.Bumblebee.rewrite()
        assert %{attention: 2, rotary_embedding: 2} = report.replaced
        compare(spec, report.replaced)
      end

      test "T5: attention with a bias, in an encoder and a decoder" do
        spec =
          Bumblebee.configure(Text.T5,
            architecture: :for_conditional_generation,
            vocab_size: 64,
            hidden_size: 32,
            intermediate_size: 48,
            attention_head_size: 8,
            encoder_num_blocks: 2,
            decoder_num_blocks: 2,
            encoder_num_attention_heads: 4,
            decoder_num_attention_heads: 4
          )

        ids = Nx.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]])
        inputs = Map.merge(inputs(), %{"decoder_input_ids" => ids})
        model = Bumblebee.build_model(spec)
        {_, report} = Metalloid.Bumblebee.rewrite(model)
        assert %{attention: 6, rms_norm: 12} = report.replaced
        compare(spec, report.replaced, inputs, 1.0e-4)
      end

      test "a prompt and then a token at a time, with a cache" do
        for {module, opts} <- [{Text.Llama, @grouped}, {Text.Mistral, @grouped ++ [attention_window_size: 2]}] do
          spec = spec(module, opts)
          model = Bumblebee.build_model(spec)
          {new, _} = Metalloid.Bumblebee.rewrite(model)
          {init, predict} = Axon.build(model)
          {_, new_predict} = Axon.build(new)
          params = init.(inputs(), Axon.ModelState.empty())
          ids = inputs()["input_ids"]
          mask = inputs()["attention_mask"]
          cache = module.init_cache(spec, 2, 8, inputs())

          Enum.reduce([0..2, 3..3, 4..5], {cache, cache}, fn range, {cache, new_cache} ->
            positions = mask |> Nx.cumulative_sum(axis: 1) |> Nx.subtract(1) |> Nx.max(0)

            step = %{
              "input_ids" => ids[[.., range]],
              "attention_mask" => mask[[.., range]],
              "position_ids" => positions[[.., range]]
            }

            out = predict.(params, Map.put(step, "cache", cache))
            new_out = new_predict.(params, Map.put(step, "cache", new_cache))
            close(new_out.logits, out.logits, step["attention_mask"], 2.0e-6)
            {out.cache, new_out.cache}
          end)
        end
      end

      test "a head mask is obeyed, by the original" do
        head_mask = Nx.tensor([[1, 0, 1, 0.5], [0, 1, 1, 1]])
        inputs = Map.put(inputs(), "attention_head_mask", head_mask)
        compare(spec(Text.Llama, @grouped), @of_decoder, inputs)
      end

      test "attention weights may still be asked for" do
        spec = spec(Text.Llama, @grouped)
        model = Bumblebee.build_model(spec)
        {new, _} = Metalloid.Bumblebee.rewrite(model)
        {init, predict} = Axon.build(model, global_layer_options: [output_attentions: true])
        {_, new_predict} = Axon.build(new, global_layer_options: [output_attentions: true])
        params = init.(inputs(), Axon.ModelState.empty())
        [first, _] = Tuple.to_list(predict.(params, inputs()).attentions)
        [new_first, _] = Tuple.to_list(new_predict.(params, inputs()).attentions)
        assert Nx.to_number(Nx.all_close(first[0], new_first[0], atol: 1.0e-6)) == 1
      end

      test "bfloat16" do
        spec = spec(Text.Qwen3, @grouped ++ [attention_head_size: 16])
        policy = Axon.MixedPrecision.create_policy(params: {:bf, 16}, compute: {:bf, 16}, output: {:bf, 16})
        model = spec |> Bumblebee.build_model() |> Axon.MixedPrecision.apply_policy(policy)
        {new, _} = Metalloid.Bumblebee.rewrite(model)
        {init, predict} = Axon.build(model)
        {_, new_predict} = Axon.build(new)
        params = init.(inputs(), Axon.ModelState.empty())
        [expected, got] = Enum.map([predict, new_predict], & &1.(params, inputs()).logits)
        assert Nx.type(got) == Nx.type(expected)
        close(got, expected, inputs()["attention_mask"], 2.0e-2)
      end

      test "what load_model gives is taken and given back" do
        model = Bumblebee.build_model(spec(Text.Llama, @grouped))

        assert {%{params: :params, model: %Axon{}}, %{replaced: @of_decoder}} =
                 Metalloid.Bumblebee.rewrite(%{model: model, params: :params, spec: nil})
      end
    else
      @tag skip: "Bumblebee is not found"
      test "models of Bumblebee", do: :ok
    end
  end
end
