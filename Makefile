# make demo      the whole pipeline on the demo checkpoint, with its answer and timings
# make real      the published checkpoint, downloaded and tried: what it needs, then a report
# make serve     the same model over HTTP, and a page to ask it on: http://127.0.0.1:8000
# make test      the tests      make test-slow    full model sizes, and further ways of the tests
# make lint      ruff           make test-lavis   the ones that need LAVIS, in .venv-lavis
# make test-gpu  the ones on an NVIDIA GPU, with the packages that PYTHON has

PYTHON ?= python3
VENV := .venv
OUT := demo/out
# Real bindings, whose libraries only NVIDIA's own index has: enough to check every name we use.
# 10.14.1 is the one that requirements-tensorrt.txt installs.
TENSORRT_BINDINGS := 10.14.1.48.post1 10.16.1.11 11.4.0.106
# Each asks for older releases of the others and of torch than it needs, hence --no-deps.
LAVIS := salesforce-lavis==1.0.2 timm==0.4.12 fairscale==0.4.4 torchvision==0.15.2

.PHONY: demo real serve test test-gpu test-slow test-lavis lint environments clean

demo: $(VENV)/run-installed
	$(VENV)/bin/python onnx_export.py --model_dir demo/checkpoint --image demo/scene.png --output_dir $(OUT)
	$(VENV)/bin/python opt/convert_checkpoint.py --model_dir demo/checkpoint --output_dir $(OUT)/opt/fp16
	@echo
	$(ASK) --input_text ""
	@echo
	$(ASK) --input_text "What colour is the circle?"
	@printf '\nMany pictures, drawn to try it on:\n  %s && \\\n  %s\n' \
		'$(VENV)/bin/python -m demo.draw photos 200' \
		'$(ASK) --input_dir photos --output captions.jsonl --html captions.html'

ASK = $(VENV)/bin/python run.py --engine_dir $(OUT) --opt_engine_dir $(OUT)/opt/fp16

# FLAGS="--model_dir DIRECTORY --image photo.jpg" without a network: python -m bench.real --help
real: $(VENV)/real-installed
	$(VENV)/bin/python -m bench.real $(FLAGS)

serve: $(VENV)/serve-installed
	$(VENV)/bin/python serve.py --engine_dir demo/checkpoint --opt_engine_dir demo/checkpoint $(FLAGS)

# Two test processes, one thread each: more would only wait for one another.
test: $(VENV)/test-installed $(VENV)/browser-sought .venv-oldest/installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadgroup -m "not slow and not gpu"
	$(MAKE) test-gpu PYTHON=$(VENV)/bin/python

# Installs nothing: the PyTorch of a GPU's image is tested as it is.
test-gpu:
	$(PYTHON) -m pytest -m gpu tests/gpu

test-slow: $(VENV)/test-installed
	$(VENV)/bin/python -m pytest -m slow -s

test-lavis: $(VENV)/test-installed .venv-lavis/installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadgroup tests/test_lavis.py

lint: $(VENV)/test-installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

environments: $(VENV)/test-installed $(VENV)/browser-sought .venv-oldest/installed .venv-lavis/installed

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip

$(VENV)/run-installed: requirements.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/serve-installed: requirements-serve.txt $(VENV)/run-installed
	$(VENV)/bin/python -m pip install --quiet -r requirements-serve.txt
	touch $@

# On a machine with a GPU what its kernels need, too.
$(VENV)/real-installed: requirements-real.txt requirements-gpu.txt $(VENV)/run-installed
	$(VENV)/bin/python -m pip install --quiet -r requirements-real.txt \
		$$(command -v nvidia-smi > /dev/null && echo -r requirements-gpu.txt)
	touch $@

# What the page is looked at with. Without one, and without the right to install it, those tests skip.
$(VENV)/browser-sought: | $(VENV)/bin/python
	command -v chromium || command -v chromium-browser || { test "$$(id -u)" != 0 || ! command -v apt-get; } \
		|| { apt-get update -qq && apt-get install -y -qq chromium; } > $@.log 2>&1 || tail -n 3 $@.log
	touch $@

$(VENV)/test-installed: requirements-test.txt requirements-ray.txt requirements-serve.txt $(VENV)/run-installed
	$(VENV)/bin/python -m pip install --quiet -r requirements-test.txt
	for version in $(TENSORRT_BINDINGS); do \
		$(VENV)/bin/python -m pip install --quiet --no-deps --upgrade \
			--target $(VENV)/tensorrt_bindings/$$version tensorrt_cu13_bindings==$$version || exit 1; \
	done
	touch $@

# run.py beside TensorRT-LLM meets older packages than the export does.
.venv-oldest/installed: requirements-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet -r requirements-oldest.txt
	touch $@

# For Python 3.11 at most. Few of the many modules are ever imported: those are compiled then.
.venv-lavis/installed: requirements-lavis.txt
	$(PYTHON) -m venv .venv-lavis
	.venv-lavis/bin/python -m pip install --quiet --no-compile -r requirements-lavis.txt
	.venv-lavis/bin/python -m pip install --quiet --no-compile --no-deps $(LAVIS)
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-lavis $(OUT)
