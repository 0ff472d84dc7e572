if Code.ensure_loaded?(Nx) do
  defmodule Metalloid.Fast do
    @moduledoc """
    The functions of `EMLX.Fast`, on any machine: fused norms, rotary position embedding, attention and gated
    activations for Nx.

    `EMLX.Fast.f(...)` becomes `Metalloid.Fast.f(...)` with the same names, arities, argument order and results, of
    v0.3.0 and v0.4.1 alike (`einsum/2` aside: `Nx.dot` serves). Every function runs outside `defn`, inside it, under
    `Nx.Defn.jit/2` and in `Axon.rewrite_nodes/2`: it is a `deftransform` over `Nx.runtime_call/4`.

        iex> x = Nx.tensor([[3.0, 4.0]])
        iex> y = Metalloid.Fast.rms_norm(x, Nx.tensor([1.0, 1.0]), 0.0)
        iex> Nx.all_close(y, Nx.tensor([[0.84852815, 1.1313708]]))
        #Nx.Tensor<
          u8
          1
        >

    ## Tensors

    Floating tensors are `f32`, `f16`, `bf16` or `f64`, and those of a call may differ. Arithmetic is float32 inside
    (float64 as soon as one is `f64`) and rounded once to the type of the first tensor. A number, such as `eps` or
    `scale`, may be a scalar tensor as well.

    Tensors of `Nx.BinaryBackend` are read where they lie and results are not copied either. Those of another backend
    are transferred to the CPU's memory, and the result back to the backend of the first tensor.

    ## Gradients

    Under `Nx.Defn.grad/2` the forward pass is the fused one. The backward pass of rope is the fused rotation by the
    opposite angle; the others are plain Nx formulas for now, which store what the fused operation does not (attention:
    the scores). Positions, frequencies, integer masks and key masks have no gradient.

    ## Errors

    `ArgumentError` with one line that names the operation and the argument. What only the values of tensors or their
    shapes tell is found when the call runs, which for a `defn` is after it was compiled.
    """

    import Nx.Defn

    alias Metalloid.Fast.Formulas
    alias Metalloid.NIF
    alias Metalloid.Tensor

    @type tensor :: Nx.Tensor.t()
    @type scalar :: number() | Nx.Tensor.t()

    # ---- norms -----------------------------------------------------------------------------------

    @doc """
    `x / sqrt(mean(x²) + eps) * weight` over the last axis ([Zhang & Sennrich 2019](https://arxiv.org/abs/1910.07467)).

      * `x` - rank 1 or more
      * `weight` - `{H}`, with H the last extent of `x`, or `nil`
      * `eps` - finite, not negative

    The result has the shape and type of `x`.
    """
    @spec rms_norm(tensor(), tensor() | nil, scalar()) :: tensor()
    deftransform rms_norm(x, weight, eps) do
      call(:rms_norm, [x: x, weight: weight, eps: eps], &Formulas.rms_norm/1)
    end

    @doc """
    `layer_norm/4` without bias.
    """
    @spec layer_norm(tensor(), tensor() | nil, scalar()) :: tensor()
    deftransform layer_norm(x, weight, eps) do
      call(:layer_norm, [x: x, weight: weight, eps: eps], &Formulas.layer_norm/1)
    end

    @doc """
    `(x - mean) / sqrt(variance + eps) * weight + bias` over the last axis, with the biased variance
    ([Ba et al. 2016](https://arxiv.org/abs/1607.06450)).

      * `x` - rank 1 or more; rows with a large mean keep their accuracy
      * `weight`, `bias` - `{H}`, with H the last extent of `x`, or `nil`
      * `eps` - finite, not negative

    The result has the shape and type of `x`.

        iex> x = Nx.tensor([[1.0, 2.0, 3.0]])
        iex> y = Metalloid.Fast.layer_norm(x, Nx.tensor([1.0, 1.0, 1.0]), Nx.tensor([1.0, 1.0, 1.0]), 0.0)
        iex> Nx.to_number(y[0][1])
        1.0
    """
    @spec layer_norm(tensor(), tensor() | nil, tensor() | nil, scalar()) :: tensor()
    deftransform layer_norm(x, weight, bias, eps) do
      call(:layer_norm, [x: x, weight: weight, bias: bias, eps: eps], &Formulas.layer_norm/1)
    end

    # ---- gated activations -----------------------------------------------------------------------

    @doc """
    `silu(gate) * up`, with `silu(x) = x / (1 + exp(-x))` ([Shazeer 2020](https://arxiv.org/abs/2002.05202)).

    Both of the same shape; the result has it and the type of `gate`. Finite for every finite input.

        iex> y = Metalloid.Fast.swiglu(Nx.tensor([2.0, -1000.0]), Nx.tensor([2.0, 2.0]))
        iex> Nx.to_flat_list(Nx.equal(y, 0.0))
        [0, 1]
    """
    @spec swiglu(tensor(), tensor()) :: tensor()
    deftransform swiglu(gate, up) do
      call(:swiglu, [gate: gate, up: up], &Formulas.swiglu/1)
    end

    @doc """
    `gelu(gate) * up`, as Gemma has it. `EMLX.Fast` does not have this function.

    The option `:approximate` is `:none` (by erf, the default) or `:tanh`.
    """
    @spec geglu(tensor(), tensor(), [{:approximate, :none | :tanh}]) :: tensor()
    deftransform geglu(gate, up, opts \\ []) do
      opts = Keyword.validate!(opts, approximate: :none)
      call(:geglu, [gate: gate, up: up, approximate: opts[:approximate]], &Formulas.geglu/1)
    end

    # ---- rotary position embedding ---------------------------------------------------------------

    @doc """
    Rotary position embedding, the time axis second to last ([Su et al. 2021](https://arxiv.org/abs/2104.09864)).

      * `a` - `{B, ..., T, D}`
      * `dims` - how many features are rotated: even, from 2 to D
      * `traditional` - `true` turns the pairs `(a[2i], a[2i+1])`, `false` the pairs `(a[i], a[i + dims/2])`
      * `base` - pair i turns by `position * scale * base^(-2i/dims)`
      * `scale` - multiplies positions
      * `offset` - the position of the first time step, an integer; also a tensor `{}`, `{1}` or `{B}`

    The result has the shape and type of `a`. Angles are formed in float64: large positions keep their accuracy.

        iex> a = Nx.tensor([[[1.0, 0.0]]])
        iex> y = Metalloid.Fast.rope(a, 2, false, 10_000, 1.0, 0)
        iex> Nx.to_flat_list(y)
        [1.0, 0.0]
    """
    @spec rope(tensor(), pos_integer(), boolean(), scalar(), scalar(), integer() | tensor()) :: tensor()
    deftransform rope(a, dims, traditional, base, scale, offset) do
      position = if tensor?(offset), do: {:offsets, offset}, else: {:offset, offset}
      rotate([position, a: a, dims: dims, traditional: traditional, base: base, scale: scale])
    end

    @doc """
    `rope/6` with a position for each token, the time axis at 1.

      * `a` - `{B, T, ..., D}`: heads not yet transposed
      * `position_ids` - `{B, T}` integers in any order, repeated ones and padding included, in the range of int32

    What limits `EMLX.Fast` here (sequential positions for T = 1, `traditional: false` alone, another path for a large
    `base`) does not exist.
    """
    @spec rope_with_positions(tensor(), tensor(), pos_integer(), boolean(), scalar(), scalar()) :: tensor()
    deftransform rope_with_positions(a, position_ids, dims, traditional, base, scale) do
      rotate(
        a: a,
        position_ids: position_ids,
        dims: dims,
        traditional: traditional,
        base: base,
        scale: scale,
        time_axis: 1
      )
    end

    @doc """
    `rope_with_positions/6` with precomputed inverse frequencies: pair i turns by `position * scale * inv_freqs[i]`.

      * `inv_freqs` - `{dims/2}`

    > #### Not as EMLX computes it {: .warning}
    >
    > `EMLX.Fast.rope_with_freqs/6` documents inverse frequencies and hands them to MLX, which divides by them, so that
    a Llama 3
    > checkpoint turns by wrong angles. Here they are what the documentation says. To have what EMLX computes, pass
    > `Nx.divide(1, inv_freqs)`.
    """
    @spec rope_with_freqs(tensor(), tensor(), pos_integer(), boolean(), scalar(), tensor()) :: tensor()
    deftransform rope_with_freqs(a, position_ids, dims, traditional, scale, inv_freqs) do
      rotate(
        a: a,
        position_ids: position_ids,
        dims: dims,
        traditional: traditional,
        inv_freqs: inv_freqs,
        scale: scale,
        time_axis: 1
      )
    end

    # The gradient of a rotation is the rotation back.
    defp rotate(arguments) do
      back = fn g -> rotate(Keyword.merge(arguments, a: g, scale: Nx.negate(arguments[:scale]))) end
      call(:rope, Keyword.put(Keyword.delete(arguments, :a), :x, arguments[:a]), {:x, back})
    end

    # ---- attention -------------------------------------------------------------------------------

    @doc """
    `softmax(scale * q kᵀ) v` without storing the scores.

      * `q` - `{B, N_q, T_q, D}`
      * `k` - `{B, N_kv, T_kv, D}`; N_q is a multiple of N_kv, and query head h reads key head `div(h, div(N_q, N_kv))`
      * `v` - `{B, N_kv, T_kv, D_v}`
      * `scale` - usually `1 / :math.sqrt(d)`

    The result is `{B, N_q, T_q, D_v}` of the type of `q`.
    """
    @spec scaled_dot_product_attention(tensor(), tensor(), tensor(), scalar()) :: tensor()
    deftransform scaled_dot_product_attention(q, k, v, scale) do
      attention(q, k, v, scale, [])
    end

    @doc """
    `scaled_dot_product_attention/4` with a mask, or with a keyword list of options.

    The mask broadcasts to `{B, N_q, T_q, T_kv}` and is not stored so. Integers hide where they are 0 (Nx has no boolean
    type); floating values are added to the scores, and `-inf` hides. A query that sees no key gives zeros; what a
    hidden key or value holds, even NaN, never matters.

    ## Options

      * `:sinks` - `{N_q}`, a logit a head that takes part in the softmax and has no value

    and, beyond EMLX's:

      * `:mask` - as above
      * `:key_mask` - `{B, T_kv}` integers, 0 hides
      * `:causal` - query i sees keys up to `i + causal_offset`
      * `:causal_offset` - an integer or a scalar tensor; default `T_kv - T_q`: the last query sees the last key
      * `:window` - query i sees the last `window` keys up to `i + causal_offset` alone
      * `:softcap` - scores become `c * tanh(scores / c)`
      * `:time_axis` - 1 where `q`, `k`, `v` and the result are `{B, T, N, D}`: no transposition is needed; default 2

    ## Examples

        iex> q = Nx.tensor([[[[1.0]]]])
        iex> k = Nx.tensor([[[[0.0], [0.0]]]])
        iex> v = Nx.tensor([[[[2.0], [4.0]]]])
        iex> Metalloid.Fast.scaled_dot_product_attention(q, k, v, 1.0) |> Nx.to_flat_list()
        [3.0]
        iex> Metalloid.Fast.scaled_dot_product_attention(q, k, v, 1.0, Nx.tensor([[1, 0]])) |> Nx.to_flat_list()
        [2.0]
    """
    @spec scaled_dot_product_attention(tensor(), tensor(), tensor(), scalar(), tensor() | keyword()) :: tensor()
    deftransform scaled_dot_product_attention(q, k, v, scale, opts) when is_list(opts) do
      attention(q, k, v, scale, opts)
    end

    deftransform scaled_dot_product_attention(q, k, v, scale, mask) do
      attention(q, k, v, scale, mask: mask)
    end

    @doc """
    `scaled_dot_product_attention/5` with a mask and options.
    """
    @spec scaled_dot_product_attention(tensor(), tensor(), tensor(), scalar(), tensor(), keyword()) :: tensor()
    deftransform scaled_dot_product_attention(q, k, v, scale, mask, opts) when is_list(opts) do
      attention(q, k, v, scale, Keyword.put(opts, :mask, mask))
    end

    @doc """
    `scaled_dot_product_attention/5` where query i sees keys up to `i + T_kv - T_q`: the last query sees the last key.
    Hidden blocks of scores are not computed.

    `opts` are those of `scaled_dot_product_attention/5`, `:sinks` among them.
    """
    @spec scaled_dot_product_attention_causal(tensor(), tensor(), tensor(), scalar(), keyword()) :: tensor()
    deftransform scaled_dot_product_attention_causal(q, k, v, scale, opts \\ []) when is_list(opts) do
      attention(q, k, v, scale, Keyword.put(opts, :causal, true))
    end

    @doc """
    Causal attention under a mask of keys, `key_mask` `{B, T_kv}` integers, 0 hides.

    T_q = 1 sees every key that `key_mask` allows. For T_q > 1, query i sees keys up to i where some key is masked (a
    padded prompt, perhaps before an allocated cache), and up to `i + T_kv - T_q` where none is; for T_q = T_kv the two
    agree. That is EMLX's eager rule, followed inside `defn` too.

    `opts` are those of `scaled_dot_product_attention/5`, `:sinks` among them.
    """
    @spec scaled_dot_product_attention_causal_key_masked(tensor(), tensor(), tensor(), scalar(), tensor(), keyword()) ::
            tensor()
    deftransform scaled_dot_product_attention_causal_key_masked(q, k, v, scale, key_mask, opts \\ [])
                 when is_list(opts) do
      attention(q, k, v, scale, Keyword.merge(opts, causal: :key_masked, key_mask: key_mask))
    end

    @attention_options [
      :sinks,
      :mask,
      :key_mask,
      :causal_offset,
      :window,
      :softcap,
      causal: false,
      time_axis: 2
    ]

    defp attention(q, k, v, scale, opts) do
      opts = Keyword.validate!(opts, @attention_options)

      call(
        :scaled_dot_product_attention,
        [q: q, k: k, v: v, scale: scale] ++ opts,
        &Formulas.scaled_dot_product_attention/1
      )
    end

    @doc """
    A decode step: writes `new_k` and `new_v` into the caches at time `offset`, then attends with `q` over them.

      * `q` - `{B, T_q, N_q, D}`, heads not transposed
      * `new_k`, `new_v` - `{B, T_q, N_kv, D}`
      * `k_cache`, `v_cache` - `{B, T_max, N_kv, D}`, of the types of `new_k` and `new_v`
      * `offset` - an integer, `{}` or `{1}`; clamped to `[0, T_max - T_q]` as `Nx.put_slice/3` does
      * `key_mask` - `{B, T_max}` integers, 0 hides
      * `scale` - usually `1 / :math.sqrt(d)`

    Returns `{out, k_cache, v_cache}`: `out` is `{B, N_q, T_q, D}`, heads transposed, and the caches are new ones. T_q =
    1 sees every key that `key_mask` allows; T_q > 1 is causal too, from `offset` on (EMLX ignores the offset there).
    """
    @spec kv_cache_sdpa_update(
            tensor(),
            tensor(),
            tensor(),
            tensor(),
            tensor(),
            integer() | tensor(),
            tensor() | nil,
            scalar()
          ) :: {tensor(), tensor(), tensor()}
    deftransform kv_cache_sdpa_update(q, new_k, new_v, k_cache, v_cache, offset, key_mask, scale) do
      arguments = [q: q, new_k: new_k, new_v: new_v, k_cache: k_cache, v_cache: v_cache]

      call(:kv_cache_sdpa_update, arguments ++ [offset: offset, key_mask: key_mask, scale: scale], {
        &Formulas.kv_cache_attention/1,
        &Formulas.put_slice(&1.k_cache, &1.new_k, &1.offset),
        &Formulas.put_slice(&1.v_cache, &1.new_v, &1.offset)
      })
    end

    # ---- calls -----------------------------------------------------------------------------------

    # Tensors among the arguments are operands of the runtime call, the rest are its options. `gradient` is a formula of
    # all arguments, whose derivative is taken, or {name, the gradient of that argument}; for several results a tuple of
    # formulas.
    defp call(operation, arguments, gradient) do
      {tensors, others} =
        arguments
        |> Enum.reject(fn {_, value} -> value == nil end)
        |> Enum.map(fn {name, value} -> {name, prepare(operation, name, value)} end)
        |> Enum.split_with(fn {_, value} -> tensor?(value) end)

      tensors = Map.new(tensors)
      template = template(operation, tensors, Map.new(others))
      options = [operation: operation, template: template, arguments: others]
      result = Nx.runtime_call(template, tensors, options, &__MODULE__.run/2)

      if Enum.any?(tensors, fn {_, tensor} -> traced?(tensor) end),
        do: differentiable(result, tensors, Map.new(others), gradient),
        else: result
    end

    @operands [:x, :weight, :bias, :gate, :up, :q, :k, :v, :mask, :key_mask, :sinks, :inv_freqs, :position_ids] ++
                [:new_k, :new_v, :k_cache, :v_cache]

    defp prepare(operation, name, value) when name in @operands do
      tensor = Nx.to_tensor(value)

      if tensor.vectorized_axes != [],
        do: raise(ArgumentError, "#{operation}: #{name} is vectorized, which is not supported; see Nx.devectorize/2")

      tensor
    end

    defp prepare(_operation, _name, value), do: value

    defp tensor?(%Nx.Tensor{}), do: true
    defp tensor?(_), do: false

    defp template(:scaled_dot_product_attention, %{q: q, v: v}, _) do
      [q_rank, v_rank] = [Nx.rank(q), Nx.rank(v)]

      for {name, rank} <- [q: q_rank, v: v_rank], rank != 4 do
        raise ArgumentError, "scaled_dot_product_attention: #{name} must have rank 4, got #{rank}"
      end

      Nx.template(put_elem(Nx.shape(q), 3, elem(Nx.shape(v), 3)), Nx.type(q), names: Nx.names(q))
    end

    defp template(:kv_cache_sdpa_update, %{q: q, k_cache: k_cache, v_cache: v_cache}, _) do
      for {name, tensor} <- [q: q, k_cache: k_cache, v_cache: v_cache], Nx.rank(tensor) != 4 do
        raise ArgumentError, "kv_cache_sdpa_update: #{name} must have rank 4, got #{Nx.rank(tensor)}"
      end

      {batch, time, heads, _} = Nx.shape(q)
      out = Nx.template({batch, heads, time, elem(Nx.shape(v_cache), 3)}, Nx.type(q))
      {out, Nx.to_template(k_cache), Nx.to_template(v_cache)}
    end

    defp template(_, %{x: x}, _), do: Nx.to_template(x)
    defp template(_, %{gate: gate}, _), do: Nx.to_template(gate)

    # ---- gradients -------------------------------------------------------------------------------

    defp traced?(tensor), do: match?(%Nx.Tensor{data: %Nx.Defn.Expr{}}, tensor)

    # Floating operands have a gradient, positions and frequencies none; a tensor that has its values already is a
    # constant.
    defp differentiable(result, tensors, others, formulas) when is_tuple(result) and tuple_size(formulas) == 3 do
      Enum.zip_with(Tuple.to_list(result), Tuple.to_list(formulas), &differentiable(&1, tensors, others, &2))
      |> List.to_tuple()
    end

    defp differentiable(result, tensors, _others, {name, gradient}) do
      if traced?(tensors[name]),
        do: Nx.Defn.Kernel.custom_grad(result, [tensors[name]], &[Nx.as_type(gradient.(&1), Nx.type(tensors[name]))]),
        else: result
    end

    defp differentiable(result, tensors, others, formula) do
      {differentiated, fixed} =
        Map.split_with(tensors, fn {_, tensor} -> traced?(tensor) and Nx.Type.float?(Nx.type(tensor)) end)

      {names, inputs} = Enum.unzip(differentiated)
      # Some functions of Nx take expressions alone where one of their arguments is one.
      fixed = Map.new(fixed, fn {name, tensor} -> {name, Nx.Defn.Expr.tensor(tensor)} end)

      Nx.Defn.Kernel.custom_grad(result, inputs, fn g ->
        # The product of g with the Jacobian is the gradient of the sum of g times the results.
        inputs
        |> List.to_tuple()
        |> Nx.Defn.grad(fn values ->
          names
          |> Enum.zip(Tuple.to_list(values))
          |> Map.new()
          |> Map.merge(fixed)
          |> Map.merge(others)
          |> formula.()
          |> Nx.multiply(g)
          |> Nx.sum()
        end)
        |> Tuple.to_list()
        |> Enum.zip_with(inputs, &Nx.as_type(&1, Nx.type(&2)))
      end)
    end

    # ---- the call itself, on tensors that have values --------------------------------------------

    @doc false
    def run(tensors, options) do
      all = Map.merge(tensors, Map.new(options[:arguments]))
      first = all[:x] || all[:gate] || all[:q]

      case {options[:template], execute(options[:operation], all)} do
        {%Nx.Tensor{} = template, result} ->
          Tensor.from_term(result, template, first)

        {templates, results} ->
          [Tuple.to_list(results), Tuple.to_list(templates)]
          |> Enum.zip_with(fn [result, template] -> Tensor.from_term(result, template, first) end)
          |> List.to_tuple()
      end
    end

    defp execute(:rms_norm, all), do: NIF.rms_norm(binary(all.x), binary(all[:weight]), number(all.eps))

    defp execute(:layer_norm, all),
      do: NIF.layer_norm(binary(all.x), binary(all[:weight]), binary(all[:bias]), number(all.eps))

    defp execute(:swiglu, all), do: NIF.swiglu(binary(all.gate), binary(all.up))
    defp execute(:geglu, all), do: NIF.geglu(binary(all.gate), binary(all.up), approximate: all.approximate)

    defp execute(:rope, all) do
      NIF.rope(binary(all.x), number(all.dims),
        traditional: all.traditional,
        scale: number(all.scale),
        base: number(all[:base]),
        offset: all[:offset],
        time_axis: all[:time_axis],
        inv_freqs: binary(all[:inv_freqs]),
        offsets: binary(all[:offsets]),
        position_ids: binary(all[:position_ids])
      )
    end

    defp execute(:scaled_dot_product_attention, all) do
      NIF.scaled_dot_product_attention(binary(all.q), binary(all.k), binary(all.v), number(all.scale),
        causal: all.causal,
        causal_offset: number(all[:causal_offset]),
        window: all[:window],
        softcap: number(all[:softcap]),
        time_axis: all.time_axis,
        mask: binary(all[:mask]),
        key_mask: binary(all[:key_mask]),
        sinks: binary(all[:sinks])
      )
    end

    defp execute(:kv_cache_sdpa_update, all) do
      latest = elem(Nx.shape(all.k_cache), 1) - elem(Nx.shape(all.q), 1)

      NIF.kv_cache_sdpa_update(
        binary(all.q),
        binary(all.new_k),
        binary(all.new_v),
        binary(all.k_cache),
        binary(all.v_cache),
        all.offset |> number() |> min(latest) |> max(0),
        binary(all[:key_mask]),
        number(all.scale)
      )
    end

    defp binary(nil), do: nil
    defp binary(tensor), do: Tensor.to_term(tensor)

    # {1} is as good as {}, where EMLX takes it.
    defp number(%Nx.Tensor{shape: {1}} = tensor), do: tensor |> Nx.squeeze() |> Nx.to_number()
    defp number(%Nx.Tensor{} = tensor), do: Nx.to_number(tensor)
    defp number(other), do: other
  end
end
