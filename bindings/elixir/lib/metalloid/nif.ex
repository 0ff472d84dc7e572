defmodule Metalloid.NIF do
  @moduledoc ~S"""
  Every operation of the C library, on binaries.

  A tensor is `{type, shape, binary}`: a type as Nx writes it, a tuple of extents, and the elements in row-major order
  and the machine's byte order.

      iex> x = {{:f, 32}, {1, 2}, <<3.0::float-native-32, 4.0::float-native-32>>}
      iex> {{:f, 32}, {1, 2}, y} = Metalloid.NIF.rms_norm(x, nil, 0.0)
      iex> for <<value::float-native-32 <- y>>, do: Float.round(value, 4)
      [0.8485, 1.1314]

  ## Types

  "Floating" is any of `{:f, 16}`, `{:bf, 16}`, `{:f, 32}` and `{:f, 64}`; "integer" is `{:s, n}` or `{:u, n}` of 8, 16,
  32 or 64 bits. Operands may differ in type. Arithmetic is float32 inside (float64 as soon as an operand is), rounded
  once. A result has the type of the first tensor, unless the option `:type` names another floating one.

  An integer mask is a boolean one: 0 hides, whatever else it holds shows. A floating mask is added to the scores.

  ## Memory and schedulers

  Inputs are read where they lie; only a binary that is not aligned to its elements, as a part of another binary may be,
  is copied first, and so is a mask of integers wider than a byte. Results are binaries over the memory that the library
  wrote. Calls that take more than a few microseconds run on dirty CPU schedulers.

  ## Errors

  `ArgumentError` with one line that names the operation and the argument, and nothing is written:

      iex> x = {{:f, 32}, {1, 1, 2}, <<0::64>>}
      iex> Metalloid.NIF.rope(x, 1)
      ** (ArgumentError) rope: dims must be even and 2 or more, got 1

  `RuntimeError` where there is no memory for a result, and where a custom kernel does not compile.
  """

  @on_load :load

  @typedoc "A type as Nx writes it."
  @type type :: {:f, 16 | 32 | 64} | {:bf, 16} | {:s | :u, 8 | 16 | 32 | 64} | {:c, 64}

  @typedoc "Type, extents, and elements in row-major order."
  @type tensor :: {type(), shape :: tuple(), binary()}

  @typedoc "Of every operation: `:type`, that of the result."
  @type type_option :: {:type, type() | nil}

  @typedoc """
    * `:traditional` - turns pairs `(x[2i], x[2i+1])` instead of `(x[i], x[i + dims/2])`; default `false`
    * `:time_axis` - 1 for `{B, T, ..., D}`; default the second to last
    * `:scale` - multiplies positions; default 1.0
    * one of `:base` (default 10000), `:freqs` (`{dims/2}`, divides the position, as in MLX) and `:inv_freqs`
      (multiplies it)
    * one of `:offset` (an integer, the position of the first step; default 0), `:offsets` (`{}`, `{1}` or `{B}`) and
      `:position_ids` (`{B, T}`, a position for each token)
  """
  @type rope_option ::
          {:traditional, boolean() | nil}
          | {:time_axis, integer() | nil}
          | {:scale, number() | nil}
          | {:base, number() | nil}
          | {:freqs | :inv_freqs | :offsets | :position_ids, tensor() | nil}
          | {:offset, integer() | nil}
          | type_option()

  @typedoc """
    * `:causal` - `true`: query i sees keys up to `i + causal_offset`. `:key_masked`: so too, but where T_q > 1 and
      `:key_mask` hides some key the offset is 0, which is EMLX's rule for a padded prompt
    * `:causal_offset` - default T_kv - T_q: the last query sees the last key
    * `:window` - query i sees only the last `window` keys up to `i + causal_offset`
    * `:softcap` - scores become `c * tanh(scores / c)`
    * `:mask` - of rank 4 at most, broadcast to `{B, N_q, T_q, T_kv}` without being stored so: integers hide where they
      are 0, floating values are added
    * `:key_mask` - `{B, T_kv}` integers, 0 hides
    * `:sinks` - `{N_q}`, a logit a head that has no value
    * `:logsumexp` - `true` returns `{out, logsumexp}`, the latter `{B, N_q, T_q}`
    * `:time_axis` - 1 where q, k, v and the result are `{B, T, N, D}`; default 2
  """
  @type attention_option ::
          {:causal, boolean() | :key_masked | nil}
          | {:causal_offset | :window | :time_axis, integer() | nil}
          | {:softcap, number() | nil}
          | {:mask | :key_mask | :sinks, tensor() | nil}
          | {:logsumexp, boolean() | nil}
          | type_option()

  @doc false
  def load do
    path = :filename.join(:code.priv_dir(:metalloid), ~c"metalloid_nif")
    :erlang.load_nif(path, 0)
  end

  # ---- norms -------------------------------------------------------------------------------------

  @doc """
  `x / sqrt(mean(x²) + eps) * weight` over the last axis.

  `x`: floating, rank 1 or more. `weight`: floating, `{H}`, or `nil`. `eps`: finite, not negative.
  """
  @spec rms_norm(tensor(), tensor() | nil, number(), [type_option()]) :: tensor()
  def rms_norm(x, weight, eps, options \\ [])
  def rms_norm(_x, _weight, _eps, _options), do: not_loaded()

  @doc """
  `(x - mean) / sqrt(variance + eps) * weight + bias` over the last axis, with the biased variance.

  `x`: floating, rank 1 or more. `weight`, `bias`: floating, `{H}`, each may be `nil`. `eps`: finite, not negative.
  """
  @spec layer_norm(tensor(), tensor() | nil, tensor() | nil, number(), [type_option()]) :: tensor()
  def layer_norm(x, weight, bias, eps, options \\ [])
  def layer_norm(_x, _weight, _bias, _eps, _options), do: not_loaded()

  @doc """
  `{x + residual, rms_norm(x + residual)}`, the norm taken of the unrounded sum.
  """
  @spec add_rms_norm(tensor(), tensor(), tensor() | nil, number(), [type_option()]) :: {tensor(), tensor()}
  def add_rms_norm(x, residual, weight, eps, options \\ [])
  def add_rms_norm(_x, _residual, _weight, _eps, _options), do: not_loaded()

  @doc """
  `{x + residual, layer_norm(x + residual)}`, the norm taken of the unrounded sum.
  """
  @spec add_layer_norm(tensor(), tensor(), tensor() | nil, tensor() | nil, number(), [type_option()]) ::
          {tensor(), tensor()}
  def add_layer_norm(x, residual, weight, bias, eps, options \\ [])
  def add_layer_norm(_x, _residual, _weight, _bias, _eps, _options), do: not_loaded()

  # ---- gated activations -------------------------------------------------------------------------

  @doc """
  `silu(gate) * up`, with `silu(x) = x / (1 + exp(-x))`. Both floating, of the same shape.

      iex> gate = {{:f, 64}, {2}, <<0.0::float-native-64, 1.0::float-native-64>>}
      iex> {_, _, <<0.0::float-native-64, y::float-native-64>>} = Metalloid.NIF.swiglu(gate, gate)
      iex> Float.round(y, 6)
      0.731059
  """
  @spec swiglu(tensor(), tensor(), [type_option()]) :: tensor()
  def swiglu(gate, up, options \\ [])
  def swiglu(_gate, _up, _options), do: not_loaded()

  @doc """
  `gelu(gate) * up`; the option `:approximate` is `:none` (by erf, the default) or `:tanh`.
  """
  @spec geglu(tensor(), tensor(), [{:approximate, :none | :tanh | nil} | type_option()]) :: tensor()
  def geglu(gate, up, options \\ [])
  def geglu(_gate, _up, _options), do: not_loaded()

  # ---- rotary position embedding -----------------------------------------------------------------

  @doc """
  Rotates the first `dims` features of the last axis, pair i by `position * scale * inv_freq[i]`.

  `x`: floating, rank 3 or more, batch first. `dims`: even, from 2 to the last extent. The angle is formed in float64,
  so large positions keep their accuracy. Positions lie in the range of int32.
  """
  @spec rope(tensor(), pos_integer(), [rope_option()]) :: tensor()
  def rope(x, dims, options \\ [])
  def rope(_x, _dims, _options), do: not_loaded()

  @doc """
  `rms_norm/4` of each head of `q` and `k` over the last axis, then `rope/3`, in one pass: `{q, k}`.

  `q`: `{B, N_q, T, D}`, `k`: `{B, N_kv, T, D}` (`{B, T, N, D}` with `time_axis: 1`). `q_weight`, `k_weight`: `{D}` or
  `nil`.
  """
  @spec qk_norm_rope(tensor(), tensor(), tensor() | nil, tensor() | nil, number(), pos_integer(), [rope_option()]) ::
          {tensor(), tensor()}
  def qk_norm_rope(q, k, q_weight, k_weight, eps, dims, options \\ [])
  def qk_norm_rope(_q, _k, _q_weight, _k_weight, _eps, _dims, _options), do: not_loaded()

  # ---- attention ---------------------------------------------------------------------------------

  @doc """
  `softmax(scale * q kᵀ + mask) v`, without storing the scores.

  `q`: `{B, N_q, T_q, D}`, `k`: `{B, N_kv, T_kv, D}`, `v`: `{B, N_kv, T_kv, D_v}`; N_q is a multiple of N_kv. A query
  that sees no key gives zeros.
  """
  @spec scaled_dot_product_attention(tensor(), tensor(), tensor(), number(), [attention_option()]) ::
          tensor() | {tensor(), tensor()}
  def scaled_dot_product_attention(q, k, v, scale, options \\ [])
  def scaled_dot_product_attention(_q, _k, _v, _scale, _options), do: not_loaded()

  @doc """
  A decode step: `{out, k_cache, v_cache}`, where the caches are copies with `new_k` and `new_v` written at time
  `offset`, and `out` is the attention of `q` over them.

  `q`: `{B, T_q, N_q, D}`; `new_k`, `new_v`: `{B, T_q, N_kv, D}`; caches: `{B, T_max, N_kv, D}`; `key_mask`:
  `{B, T_max}` integers or `nil`; `out`: `{B, N_q, T_q, D}`. T_q = 1 sees every key that `key_mask` allows; T_q > 1 is
  causal too. `0 <= offset <= T_max - T_q`.
  """
  @spec kv_cache_sdpa_update(
          tensor(),
          tensor(),
          tensor(),
          tensor(),
          tensor(),
          integer(),
          tensor() | nil,
          number(),
          [type_option()]
        ) :: {tensor(), tensor(), tensor()}
  def kv_cache_sdpa_update(q, new_k, new_v, k_cache, v_cache, offset, key_mask, scale, options \\ [])

  def kv_cache_sdpa_update(_q, _new_k, _new_v, _k_cache, _v_cache, _offset, _key_mask, _scale, _options),
    do: not_loaded()

  # ---- loss and gated delta rule -----------------------------------------------------------------

  @doc """
  `logsumexp(logits) - logits[target]` over the last axis, float32 unless `:type` says otherwise.

  `logits`: floating, `{..., V}`; `targets`: integers in `[0, V)`, `{...}`. The option `:ignore_index` is a target whose
  loss is 0.
  """
  @spec cross_entropy(tensor(), tensor(), [{:ignore_index, integer() | nil} | type_option()]) :: tensor()
  def cross_entropy(logits, targets, options \\ [])
  def cross_entropy(_logits, _targets, _options), do: not_loaded()

  @doc """
  The gated delta rule: `{out, state}`. For each step `S <- S gamma; S <- S + beta (v - S k) kᵀ; out = S q`.

  `q`, `k`: `{B, T, H_k, D_k}`; `v`: `{B, T, H_v, D_v}`; `gamma`: `{B, T, H_v}` or `{B, T, H_v, D_k}`; `beta`:
  `{B, T, H_v}`; `initial_state`: `{B, H_v, D_v, D_k}` or `nil`; `mask`: `{B, T}` integers or `nil`. H_v is a multiple
  of H_k.
  """
  @spec gated_delta_update(
          tensor(),
          tensor(),
          tensor(),
          tensor(),
          tensor(),
          tensor() | nil,
          tensor() | nil,
          [type_option()]
        ) :: {tensor(), tensor()}
  def gated_delta_update(q, k, v, gamma, beta, initial_state, mask, options \\ [])
  def gated_delta_update(_q, _k, _v, _gamma, _beta, _initial_state, _mask, _options), do: not_loaded()

  # ---- custom kernels ----------------------------------------------------------------------------

  @typedoc "What custom kernels have beside: an output of `:bool` comes as `{:u, 8}`."
  @type kernel_type :: type() | :bool

  @typedoc "An input of a custom kernel; what is no tensor is of rank 0."
  @type kernel_input :: tensor() | number() | boolean() | :infinity | :neg_infinity | :nan

  @doc """
  A kernel from the body of a function in the Metal Shading Language; `Metalloid.Kernel.metal/2` has it described. It is
  freed after the last reference to it.
  """
  @spec kernel_create(String.t(), [String.t()], [String.t()], String.t(), [
          {:header, String.t() | nil}
          | {:ensure_row_contiguous | :atomic_outputs | :debug | :address_sanitizer, boolean() | nil}
          | {:math_mode, :safe | :relaxed | :fast | nil}
          | {:max_iterations, non_neg_integer() | nil}
        ]) :: reference()
  def kernel_create(name, input_names, output_names, source, options \\ [])
  def kernel_create(_name, _input_names, _output_names, _source, _options), do: not_loaded()

  @doc """
  Runs a kernel: the tuple of its outputs. Numbers and booleans among the inputs are of rank 0, `{:s, 32}` (`{:s, 64}`
  where it has to be), `{:f, 32}` and bool.
  """
  @spec kernel_launch(
          reference(),
          [kernel_input()],
          [kernel_type()],
          [shape :: tuple()],
          {pos_integer(), pos_integer(), pos_integer()},
          {pos_integer(), pos_integer(), pos_integer()},
          [
            {:template, [{String.t(), integer() | boolean() | kernel_type()}] | nil}
            | {:init_value, number() | :infinity | :neg_infinity | :nan | nil}
          ]
        ) :: tuple()
  def kernel_launch(kernel, inputs, output_types, output_shapes, grid, threadgroup, options \\ [])

  def kernel_launch(_kernel, _inputs, _output_types, _output_shapes, _grid, _threadgroup, _options),
    do: not_loaded()

  @doc """
  The Metal source that `kernel_launch/7` compiles for such arguments, or, with `translated: true`, the C++.
  """
  @spec kernel_source(
          reference(),
          [kernel_input()],
          [kernel_type()],
          [shape :: tuple()],
          {pos_integer(), pos_integer(), pos_integer()},
          {pos_integer(), pos_integer(), pos_integer()},
          [
            {:template, [{String.t(), integer() | boolean() | kernel_type()}] | nil}
            | {:translated, boolean() | nil}
          ]
        ) :: String.t()
  def kernel_source(kernel, inputs, output_types, output_shapes, grid, threadgroup, options \\ [])

  def kernel_source(_kernel, _inputs, _output_types, _output_shapes, _grid, _threadgroup, _options),
    do: not_loaded()

  # ---- the library -------------------------------------------------------------------------------

  @doc false
  @spec version() :: charlist()
  def version, do: not_loaded()

  @doc false
  @spec cpu_isa() :: charlist()
  def cpu_isa, do: not_loaded()

  @doc false
  @spec num_threads() :: pos_integer()
  def num_threads, do: not_loaded()

  @doc false
  @spec set_num_threads(integer()) :: :ok
  def set_num_threads(_threads), do: not_loaded()

  defp not_loaded, do: :erlang.nif_error("the NIF of Metalloid is not loaded")
end
