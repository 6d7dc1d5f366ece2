# Two commands on a fresh machine: `make demo` and `make test`. Needs Python >= 3.11, make and a package index.
.PHONY: demo test gpu clean

demo:
	@scripts/setup run
	@.venv/bin/lenet-deploy demo

test:
	@scripts/setup dev
	@scripts/check

# On a machine with an NVIDIA GPU, with the packages that are there; writes into OUT.
gpu:
	@scripts/gpu

clean:
	rm -rf .venv
