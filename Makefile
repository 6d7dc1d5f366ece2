# Two commands on a fresh machine: `make demo` and `make test`. Needs Python >= 3.11, make and a package index.
.PHONY: demo test clean

demo:
	@scripts/setup run
	@.venv/bin/lenet-deploy demo

test:
	@scripts/setup dev
	@scripts/check

clean:
	rm -rf .venv
