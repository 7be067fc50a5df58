# One environment in .venv, made by whichever target needs it first; constraints.txt says which versions.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-slow lint bench bench-adaptive bench-defaults bench-network bench-network-cifar10 bench-peers \
        bench-memory bench-throughput bench-work-precision bench-training bench-round-trip bench-latents bench-likelihood \
        bench-metrics bench-calibration bench-discrete bench-proposition1 bench-table1 bench-paper-figures paper paper-short \
        train train-cifar10 clean

demo: .venv/base                    ## compare solvers on the bundled network: a table, figures and JSON in out/demo
	$(BIN)/ddim-ode compare --out out/demo

test: .venv/peers                   ## the tests, a few minutes on two cores
	$(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal

test-slow: .venv/dev                ## the tests that take minutes: training interrupted at random, ten times each way
	$(BIN)/pytest -m slow

lint: .venv/dev                     ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/peers                  ## measured orders, and overhead beside the peers: about eight minutes
	$(BIN)/python -m benchmarks.convergence
	$(BIN)/python -m benchmarks.overhead

bench-memory: .venv/dev             ## memory and time of a gradient through sample, plain and checkpointed: five minutes
	$(BIN)/python -m benchmarks.memory

bench-adaptive: .venv/dev           ## adaptive solvers: errors by tolerance, clocks, batches, torchdiffeq and scipy: a quarter of an hour
	$(BIN)/python -m benchmarks.adaptive

bench-work-precision: .venv/dev     ## error against calls and seconds, solver by solver: half an hour
	$(BIN)/python -m benchmarks.work_precision

bench-throughput: .venv/dev         ## images per second of training and sampling with the bundled networks: ten minutes
	$(BIN)/python -m benchmarks.throughput

bench-defaults: .venv/dev           ## which solver and grid are the defaults, and their gain over DDIM: a quarter of an hour
	$(BIN)/python -m benchmarks.defaults

bench-peers: .venv/peers            ## accuracy per call beside every peer at its best settings: three quarters of an hour
	$(BIN)/python -m benchmarks.peers

bench-round-trip: .venv/peers       ## encoding and decoding: every method, diffusers' inverse schedulers, Table 2: an hour
	$(BIN)/python -m benchmarks.round_trip

bench-latents: .venv/dev            ## what latents of images are good for, and how Gaussian they are: ten minutes
	$(BIN)/python -m benchmarks.latents

bench-likelihood: .venv/dev         ## errors of log-densities by calls, bits per dimension of the bundled networks: half an hour
	$(BIN)/python -m benchmarks.likelihood

bench-metrics: .venv/dev            ## what distances between sets of images are worth at which number: half an hour
	$(BIN)/python -m benchmarks.metrics

bench-calibration: .venv/peers      ## calibrated solvers on latents never fitted to, beside the default and the peers: hours
	$(BIN)/python -m benchmarks.calibration

bench-proposition1: .venv/dev       ## Proposition 1: both fields, both Euler maps: minutes
	$(BIN)/python -m benchmarks.proposition1

bench-table1: .venv/dev             ## Table 1 and its like for solvers: an hour and a half on two cores, resumes
	$(BIN)/python -m benchmarks.table1

bench-paper-figures: .venv/dev      ## Figures 3 to 6: a quarter of an hour
	$(BIN)/python -m benchmarks.paper_figures

paper: bench-proposition1 bench-discrete bench-table1 bench-paper-figures ## all experiments of the paper: about three hours on two cores
	$(BIN)/python -m benchmarks.round_trip --parts table2 --problems network,network-cifar10

paper-short: .venv/dev              ## the same on few images and steps, into out/paper: two minutes
	$(BIN)/python -m benchmarks.proposition1 --short
	$(BIN)/python -m benchmarks.discrete --short
	$(BIN)/python -m benchmarks.table1 --short
	$(BIN)/python -m benchmarks.paper_figures --short
	$(BIN)/python -m benchmarks.round_trip --short

bench-discrete: .venv/dev           ## discrete data: joints, bounds and samples by stochasticity, a network trained: half an hour
	$(BIN)/python -m benchmarks.discrete

bench-network: .venv/dev            ## the bundled network's loss beside the mixture's: about half an hour
	$(BIN)/python -m benchmarks.network_loss

bench-network-cifar10: .venv/dev    ## the same for CIFAR-10, where it is: twenty minutes
	$(BIN)/python -m benchmarks.network_loss --model cifar10 --images 2000

bench-training: .venv/dev           ## what settings of training are worth per hour, on CIFAR-10: an hour
	$(BIN)/python -m benchmarks.training

train: .venv/base                   ## train the bundled network again: an hour and a half; resumes
	$(BIN)/ddim-ode train --data fashion-mnist --out out/fashion-mnist $(shell cat ddim_ode/models/bundled/fashion-mnist.options)

train-cifar10: .venv/base           ## the same for CIFAR-10, where it is
	$(BIN)/ddim-ode train --data cifar10 --out out/cifar10 $(shell cat ddim_ode/models/bundled/cifar10.options)

clean:
	rm -rf .venv build *.egg-info

.venv/base: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -e .
	touch $@

.venv/dev: .venv/base
	$(PIP) -e '.[dev]'
	touch $@

.venv/peers: .venv/dev             # without what they require (torchvision, trackers): their samplers do without
	$(PIP) --no-deps azula k-diffusion einops torchsde trampoline
	touch $@
