defmodule Metalloid do
  @moduledoc """
  Fused transformer kernels for Elixir, on any machine.

    * `Metalloid.Fast`: the functions of `EMLX.Fast` on Nx tensors, inside `defn` and out of it (where Nx is)
    * `Metalloid.Bumblebee`: puts them into the graph of a Bumblebee model (where Axon is)
    * `Metalloid.Kernel`: kernels of your own, in the Metal Shading Language
    * `Metalloid.NIF`: every operation of the C library on binaries, which needs nothing beside Elixir

  The C library chooses its kernels by the processor's instruction set and runs them on as many threads as the process
  may use. The environment variables `METALLOID_NUM_THREADS` and `METALLOID_CPU_ISA` (`plain` turns the fast kernels
  off), set before the VM starts, override both.
  """

  @doc """
  The C library's version.

      iex> Metalloid.version()
      "0.1.0"
  """
  @spec version() :: String.t()
  def version, do: List.to_string(Metalloid.NIF.version())

  @doc """
  The instruction set whose kernels run, or `"plain"`.

      iex> is_binary(Metalloid.cpu_isa())
      true
  """
  @spec cpu_isa() :: String.t()
  def cpu_isa, do: List.to_string(Metalloid.NIF.cpu_isa())

  @doc """
  How many threads a call may use. They are the library's own; the VM's schedulers come on top.
  """
  @spec num_threads() :: pos_integer()
  def num_threads, do: Metalloid.NIF.num_threads()

  @doc """
  Sets how many threads a call may use, for the whole VM; 0 returns to `METALLOID_NUM_THREADS`, or all that the VM may
  use.

      iex> Metalloid.set_num_threads(1)
      :ok
      iex> Metalloid.num_threads()
      1
      iex> Metalloid.set_num_threads(0)
      :ok
  """
  @spec set_num_threads(non_neg_integer()) :: :ok
  def set_num_threads(threads), do: Metalloid.NIF.set_num_threads(threads)
end
