# A test run without Hex finds Nx and its like where NX_EBIN says: ebin folders, separated by colons.
nx_paths = "NX_EBIN" |> System.get_env("") |> String.split(":", trim: true)
Enum.each(nx_paths, &Code.prepend_path/1)

defmodule Metalloid.MixProject do
  use Mix.Project

  @version "0.1.0"

  def project do
    [
      app: :metalloid,
      version: @version,
      elixir: "~> 1.14",
      compilers: [:metalloid] ++ Mix.compilers(),
      prune_code_paths: System.get_env("NX_EBIN") == nil,
      deps: deps(),
      description: "Fused transformer kernels for Nx, Axon and Bumblebee: the functions of EMLX.Fast on any machine",
      package: package(),
      name: "Metalloid",
      docs: docs()
    ]
  end

  def application, do: [extra_applications: [:logger]]

  # Even an optional dependency has to be resolved, which needs Hex; Metalloid.NIF and its tests need none.
  defp deps do
    if Code.ensure_loaded?(Hex) do
      [
        {:nx, "~> 0.12", optional: true},
        {:axon, "~> 0.8", optional: true},
        {:bumblebee, "~> 0.7", optional: true},
        {:ex_doc, "~> 0.34", only: :dev, runtime: false}
      ]
    else
      []
    end
  end

  # `make native` brings the C library's sources; Hex takes files of this folder alone.
  defp package do
    [
      licenses: ["MIT"],
      links: %{},
      files: ~w(lib native guides mix.exs Makefile CMakeLists.txt c_src README.md .formatter.exs)
    ]
  end

  defp docs do
    [
      main: "readme",
      extras: ["README.md", "guides/language_model.livemd"],
      groups_for_modules: [Binaries: [Metalloid.NIF]]
    ]
  end
end

defmodule Mix.Tasks.Compile.Metalloid do
  @moduledoc false
  # Runs the Makefile with the variables that elixir_make would set; depending on that would need Hex.
  use Mix.Task.Compiler

  @impl true
  def run(_arguments) do
    case make("all") do
      0 -> {:ok, []}
      status -> Mix.raise("make failed (exit #{status}). The NIF needs make, a C compiler and CMake 3.25 or later")
    end
  end

  @impl true
  def clean do
    make("clean")
    :ok
  end

  defp make(target) do
    root = List.to_string(:code.root_dir())
    version = List.to_string(:erlang.system_info(:version))

    env = [
      {"MIX_APP_PATH", Mix.Project.app_path()},
      {"ERTS_INCLUDE_DIR", Path.join([root, "erts-" <> version, "include"])}
    ]

    {_, status} =
      System.cmd("make", ["--no-print-directory", target],
        cd: __DIR__,
        env: env,
        stderr_to_stdout: true,
        into: IO.stream(:stdio, :line)
      )

    status
  end
end
