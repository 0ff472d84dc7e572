# A test is left out aloud, with its reason.
unless Code.ensure_loaded?(Nx),
  do: IO.puts("Nx is not found (NX_EBIN names its ebin folders): the tests of Metalloid.Fast are left out")

unless Code.ensure_loaded?(Axon), do: IO.puts("Axon is not found: the tests of Metalloid.Bumblebee are left out")
# Dependencies are started by Mix, what NX_EBIN names is not.
for application <- [:nx, :axon], do: Application.ensure_all_started(application)

if Code.ensure_loaded?(Nx) do
  # A backend that is not Nx.BinaryBackend: enough of one for tensors to come from it and go back.
  defmodule Metalloid.OtherBackend do
    @behaviour Nx.Backend
    defstruct [:binary, :options]

    @impl true
    def init(options), do: options
    @impl true
    def from_binary(out, binary, options), do: %{out | data: %__MODULE__{binary: binary, options: options}}
    @impl true
    def to_binary(%{data: %{binary: binary}, type: {_, bits}}, limit), do: binary_part(binary, 0, div(limit * bits, 8))
    @impl true
    def backend_copy(tensor, Nx.BinaryBackend, options) do
      Nx.BinaryBackend.from_binary(tensor, tensor.data.binary, options)
    end

    def backend_copy(tensor, backend, options), do: backend.from_binary(tensor, tensor.data.binary, options)

    for {name, arity} <- Nx.Backend.behaviour_info(:callbacks) -- Nx.Backend.behaviour_info(:optional_callbacks),
        {name, arity} not in [init: 1, from_binary: 3, to_binary: 2, backend_copy: 3] do
      @impl true
      def unquote(name)(unquote_splicing(Macro.generate_arguments(arity, __MODULE__))) do
        _ = binding()
        raise "#{unquote(name)} is not here"
      end
    end
  end
end

ExUnit.start()
