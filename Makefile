# Two commands matter: `make demo` and `make test`. Both create .venv first, from the pins in constraints.txt.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DATA   ?= ../shared/data
WEIGHTS ?= ../shared/weights
export MPLBACKEND = Agg
export PYTHONUNBUFFERED = 1
# Where it is set, no process keeps what it compiles: each of the tests' hundreds would compile PyTorch's 1,300 files again, three seconds instead of one
export PYTHONDONTWRITEBYTECODE =
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help env everything demo test test_style_and_demo test_notebooks_and_code quick real evidence seeds ablations systems parts types neu_seg figures benchmark pretrain shipped bench bench-cluster memory screenshots export notebooks docs clean lab

help:
	@echo "make demo      from nothing to pictures of defects in unseen categories (minutes, CPU, offline after install)"
	@echo "make test      every check: style, notebooks in step, notebook tests, parity, failures, papermill, demo"
	@echo "make quick     unit and parity tests but for the slow ones: under three minutes on two cores"
	@echo "make real      DATA=... WEIGHTS=...  VisualAD on real images with a real small ViT, both ways, three seeds"
	@echo "make evidence  DATA=... WEIGHTS=...  from no good image to sixteen, on the same real images: method, its own image, good images, the rule (hours)"
	@echo "make seeds     the demo's job under three seeds -> paper_figures/tables/visualad_synthetic.csv"
	@echo "make benchmark the baselines on version 2 of the synthetic benchmark: table, powers, rank correlation with the papers (hours on one core)"
	@echo "make pretrain  train the embedded backbones again (about three and a half hours on one core)"
	@echo "make shipped DATA=...  train the checkpoint that \`zsad predict\` uses by default, measure it on photographs, write its card (a quarter of an hour)"
	@echo "make ablations the ablation tables of DMA+SAP and SSVP, and where SSVP's paper contradicts itself each reading of it; three seeds, on synthetic images"
	@echo "make parts     what each part of DMA+SAP and SSVP does: the readings that could decide it, three seeds, the recipes of the papers (hours)"
	@echo "make systems   DMA+SAP and SSVP, trained for minutes at 384 px, three seeds, on synthetic images"
	@echo "make types     which defect is it: DAPO and MultiADS, three seeds, on synthetic images"
	@echo "make neu_seg DATA=... WEIGHTS=...  which defect is it, on real steel"
	@echo "make figures   every method on synthetic images under three seeds, and every table and figure of the papers from it -> paper_figures"
	@echo "make screenshots  the widgets at work -> paper_figures/widgets (needs Debian's chromium)"
	@echo "make memory    does evaluation stream: 5,000 images against 50"
	@echo "make bench     metrics against scikit-learn and the usual loops, side by side; ten thousand maps; where the time of every method goes"
	@echo "make bench-cluster  two Dask workers against one, side by side"
	@echo "make notebooks export; execute every notebook and store what it shows; clean (a quarter of an hour)"
	@echo "make docs      the site, offline, from the notebooks as they are: runs/site/html; a broken link or a missing picture ends it"
	@echo "make export    modules from notebooks: nbdev_export, nbdev_clean, ruff format"
	@echo "make lab       JupyterLab on nbs/"

env: $(VENV)/.ready
# --no-compile: of 17,000 files a quarter is ever imported, and Python compiles those when they are
$(VENV)/.ready: settings.ini setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "zsad_nb needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V). Use make PYTHON=python3.12 ..."; exit 1; }
	@echo "creating $(VENV) (a minute or two)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q --disable-pip-version-check --no-compile -c constraints.txt torch torchvision -e ".[dev]"
	@touch $@

everything: env $(VENV)/.everything   # what tests need and use does not: engines, a cluster, a browser
$(VENV)/.everything: $(VENV)/.ready
	@$(BIN)/pip install -q --disable-pip-version-check --no-compile -c constraints.txt torch torchvision -e ".[dev,all,browser]"
	@touch $@

demo: env
	@zsad demo

# tests/system/test_printed_commands.py and test_tutorials.py execute these
EXECUTED_BY_PYTEST = '^([_.]|(ablation|benchmark|defect_types|evaluate|qualitative|train|explore_heatmaps|inside_dma_sap|inside_ssvp|which_defect)\.ipynb$$)'
# Two lines side by side: what needs one thread fills the gaps of what has two workers. Either one's failure is that of the whole.
test: everything
	@$(MAKE) --no-print-directory -j 2 test_style_and_demo test_notebooks_and_code

test_style_and_demo: export OMP_NUM_THREADS = 1
test_style_and_demo: everything
	ruff check
	ruff format --check
	mypy
	@mkdir -p runs && echo "zsad demo --out runs/demo (what it prints follows when it is done)"
	@zsad demo --out runs/demo > runs/demo.log 2>&1 || { cat runs/demo.log; exit 1; }
	@cat runs/demo.log

test_notebooks_and_code: export OMP_NUM_THREADS = 1
test_notebooks_and_code: everything
	nbdev_test --path nbs --n_workers 2 --skip_file_re $(EXECUTED_BY_PYTEST)
	pytest -n 2 --dist loadfile --no-loadscope-reorder

quick: env
	OMP_NUM_THREADS=1 pytest -n 2 --dist loadfile --no-loadscope-reorder -m quick

real: env
	@mkdir -p runs/real
	@papermill nbs/experiments/real_images.ipynb runs/real/real_images.ipynb --cwd . --log-output --no-progress-bar \
	  -p data "$(abspath $(DATA))" -p weights "$(abspath $(WEIGHTS))" -p quick False -p output "$(CURDIR)/runs/real"
	@echo; cat runs/real/real_images.txt; echo; echo "heatmaps: runs/real/figures, notebook: runs/real/real_images.ipynb"

evidence: env
	@mkdir -p runs/evidence
	@papermill nbs/experiments/evidence.ipynb runs/evidence/evidence.ipynb --cwd . --log-output --no-progress-bar \
	  -p data "$(abspath $(DATA))" -p weights "$(abspath $(WEIGHTS))" -p quick False -p output "$(CURDIR)/runs/evidence"
	@echo; cat runs/evidence/evidence.txt; echo; cat runs/evidence/tried.txt runs/evidence/cost.txt

seeds: env
	@zsad seeds

pretrain: env
	@mkdir -p runs/pretrain
	papermill nbs/experiments/pretrain_tiny.ipynb runs/pretrain/pretrain_tiny.ipynb --log-output \
	  -p steps 7000 -p batch 48 -p pool 6900 -p warmup 200 -p threads 1 -p output "$(CURDIR)/runs/pretrain/tiny_dino.safetensors"
	papermill nbs/experiments/pretrain_tiny_clip.ipynb runs/pretrain/pretrain_tiny_clip.ipynb --log-output \
	  -p steps 6000 -p tokens 1536 -p pool 9400 -p held 470 -p warmup 100 -p lr 0.0007 -p threads 1 -p state_file "$(CURDIR)/runs/pretrain/tiny_clip.pt" -p output "$(CURDIR)/runs/pretrain/tiny_clip.safetensors"

shipped: export OMP_NUM_THREADS = 1
shipped: env
	@mkdir -p runs/shipped
	papermill nbs/experiments/shipped_checkpoint.ipynb runs/shipped/shipped_checkpoint.ipynb --cwd . --no-progress-bar --log-output -p data "$(abspath $(DATA))" \
	  -p size 320 -p normal 11 -p defective 18 -p held_out 3 -p epochs 3 -p output "$(CURDIR)/runs/shipped"
	cp runs/shipped/visualad_tiny.safetensors runs/shipped/visualad_tiny.md zsad_nb/assets/
	cp runs/shipped/visualad_tiny.csv paper_figures/tables/visualad_tiny.csv

# The methods that the benchmark was made with (AnoVL adapts to every image, which takes seconds each). Others: make benchmark BENCHMARK_METHODS="visualad, dapo"; what was measured stays in runs/benchmark.
BENCHMARK_METHODS = self_distance, written_words, winclip, april_gan, anomalyclip, adaclip, crane
benchmark: export OMP_NUM_THREADS = 1
benchmark: env
	@mkdir -p runs/benchmark
	papermill nbs/experiments/benchmark.ipynb runs/benchmark/benchmark.ipynb --cwd . --no-progress-bar --log-output \
	  -y "methods: [$(BENCHMARK_METHODS)]" -y "seeds: [0, 1, 2]" -y "further_strengths: [weak, strong]" -p scenes 300 -p auxiliary 15 -p size 192 -p epochs 0 -p untrained True -p cache "$(CURDIR)/runs/features" \
	  -y "lr_scale: {adaclip: 0.1}" -y "options: {written_words: {method: winclip, scales: []}}" -p output "$(CURDIR)/runs/benchmark"

# Two threads beside anything else on the machine are many times slower than one.
ablations systems parts types neu_seg: export OMP_NUM_THREADS = 1
ABLATION = -p images 6 -p size 256 -p epochs 3 -y "seeds: [0, 1, 2]"
ablations: env
	@mkdir -p runs/ablation
	papermill nbs/experiments/ablation.ipynb runs/ablation/dma_sap.ipynb --cwd . --no-progress-bar --log-output -p method dma_sap -p lr_scale 1.0 $(ABLATION) -p output "$(CURDIR)/runs/ablation/dma_sap"
	papermill nbs/experiments/ablation.ipynb runs/ablation/ssvp.ipynb --cwd . --no-progress-bar --log-output -p method ssvp -p lr_scale 10.0 $(ABLATION) -p output "$(CURDIR)/runs/ablation/ssvp"
	papermill nbs/experiments/ablation.ipynb runs/ablation/ssvp_readings.ipynb --cwd . --no-progress-bar --log-output -p method ssvp -p table readings -p lr_scale 10.0 -p measure False -p each 0 $(ABLATION) -p output "$(CURDIR)/runs/ablation/ssvp_readings"
	@for method in dma_sap ssvp; do cp runs/ablation/$$method/ablation.csv paper_figures/tables/$${method}_ablation.csv; done
	@cp runs/ablation/ssvp_readings/ablation.csv paper_figures/tables/ssvp_readings.csv

SYSTEMS = papermill nbs/experiments/ablation.ipynb runs/systems/$(1).ipynb --cwd . --no-progress-bar --log-output -p method $(1) -y "variants: [$(2)]" -p lr_scale $(3) \
	-p images 8 -p defective 14 -p targets 14 -p size 384 -p epochs 3 -y "seeds: [0, 1, 2]" -p measure False -p output "$(CURDIR)/runs/systems/$(1)"
systems: env
	@mkdir -p runs/systems
	$(call SYSTEMS,dma_sap,D,1.0)
	$(call SYSTEMS,ssvp,E full,10.0)
	@for method in dma_sap ssvp; do cp runs/systems/$$method/ablation.csv paper_figures/tables/$${method}_synthetic.csv; done

PARTS = papermill nbs/experiments/ablation.ipynb runs/parts/$(1).ipynb --cwd . --no-progress-bar --log-output -p method $(1) -p table parts -p lr_scale 1.0 \
	-p images 6 -p size 256 -p epochs 0 -y "seeds: [0, 1, 2]" -p measure False -p each 0 -p output "$(CURDIR)/runs/parts/$(1)"
parts: env
	@mkdir -p runs/parts
	$(call PARTS,dma_sap)
	$(call PARTS,ssvp)
	@for method in dma_sap ssvp; do cp runs/parts/$$method/ablation.csv paper_figures/tables/$${method}_parts.csv; done

types: env
	@mkdir -p runs/types
	papermill nbs/experiments/defect_types.ipynb runs/types/defect_types.ipynb --cwd . --no-progress-bar --log-output \
	  -p images 8 -p defective 14 -p targets 8 -p size 384 -p epochs 3 -y "seeds: [0, 1, 2]" -p output "$(CURDIR)/runs/types"
	@cp runs/types/types.csv paper_figures/tables/types_synthetic.csv

neu_seg: env
	@mkdir -p runs/neu_seg
	papermill nbs/experiments/neu_seg.ipynb runs/neu_seg/neu_seg.ipynb --cwd . --no-progress-bar --log-output -p data "$(abspath $(DATA))" -p weights "$(abspath $(WEIGHTS))" \
	  -p images 8 -p defective 14 -p size 256 -p epochs 3 -p limit 0 -y "seeds: [0, 1, 2]" -p output "$(CURDIR)/runs/neu_seg"
	@cp runs/neu_seg/neu_seg.csv paper_figures/tables/neu_seg.csv

SYNTHETIC = --set SIZE=256 --set IMAGES=8 --set EPOCHS=3 --set CACHE="$(CURDIR)/runs/features" --workers 2
figures: env
	zsad sweep nbs/experiments/sweeps/synthetic.yaml $(SYNTHETIC)
	zsad sweep nbs/experiments/sweeps/figures.yaml $(SYNTHETIC)
	zsad figures runs/synthetic --out paper_figures --dpi 200

screenshots: everything
	@python tests/benchmarks/shoot_widgets.py
	@python nbs/site/attach.py nbs/tutorials/explore_heatmaps.ipynb $(foreach name,explorer upload,paper_figures/widgets/$(name).png)

memory: env
	@python tests/benchmarks/bench_memory.py

bench: everything
	@python tests/benchmarks/bench_metrics.py
	@python tests/benchmarks/bench_metrics.py --many
	@OMP_NUM_THREADS=1 zsad bench --batch 1 32 --out runs/bench

bench-cluster: everything
	@OMP_NUM_THREADS=1 python tests/benchmarks/bench_cluster.py

export: env   # from the notebooks to the modules
	nbdev_export
	nbdev_clean
	ruff format

notebooks: everything
	nbdev_export
	python tests/stored_outputs.py --write
	nbdev_clean
	ruff format

docs: $(VENV)/.docs   # two minutes; nothing is executed
	@python nbs/site/build_site.py --out runs/site
$(VENV)/.docs: $(VENV)/.ready
	@$(BIN)/pip install -q --disable-pip-version-check --no-compile -c constraints.txt torch torchvision -e ".[dev,docs]"
	@touch $@

lab: env
	jupyter lab nbs

clean:
	rm -rf $(VENV) runs build dist *.egg-info
