# A test is left out aloud, with its reason.
unless Code.ensure_loaded?(Nx),
  do: IO.puts("Nx is not found (NX_EBIN names its ebin folders): the tests of Metalloid.Fast are left out")

unless Code.ensure_loaded?(Axon), do: IO.puts("Axon is not found: the tests of Metalloid.Bumblebee are left out")
# Dependencies are started by Mix, what NX_EBIN names is not.
for application <- [:nx, :axon], do: Application.ensure_all_started(application)
ExUnit.start()
